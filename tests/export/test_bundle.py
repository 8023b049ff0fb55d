"""A run as a MONAI bundle: MONAI's commands take it, and its masks are those of `medi3d predict`."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from medi3d.errors import ConfigError
from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run
from medi3d.export.bundle import export_bundle, load_predictor
from medi3d.models.artifact import save_artifact
from medi3d.models.encoders import create_encoder
from medi3d.prediction.predict import run_prediction
from medi3d.training.train import run_training

pytest.importorskip("fire", reason="MONAI's bundle commands need it")

REQUIRED = [
    "schema",
    "version",
    "changelog",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "task",
    "description",
    "authors",
    "copyright",
    "network_data_format",
]
"""What MONAI's own schema requires; that one is on the web, and the tests are not."""


def trained(config, folder, *overrides):
    run_training(Run(folder, load_config(config, [*overrides, "training.steps=1"])))
    return folder


def monai(*arguments, folder):
    command = [sys.executable, "-m", "monai.bundle", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_monai_verifies_and_runs_it_and_its_masks_are_those_of_predict(cohort, config, tmp_path):
    run = trained(config, tmp_path / "run", "data.spacing=[2.5, 1.2, 1.2]")
    bundle = export_bundle(Run.open(run), tmp_path / "bundle")
    part = {"type": "object", "required": ["type", "format", "num_channels", "spatial_shape", "dtype"]}
    schema = {
        "type": "object",
        "required": REQUIRED,
        "properties": {
            "network_data_format": {
                "required": ["inputs", "outputs"],
                "properties": {
                    "inputs": {"properties": {"image": part}, "required": ["image"]},
                    "outputs": {"properties": {"pred": part}, "required": ["pred"]},
                },
            }
        },
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    meta = ["--meta_file", "configs/metadata.json", "--filepath", tmp_path / "schema.json"]
    monai("verify_metadata", *meta, folder=bundle)
    scan = cohort / "imagesTr" / "case_0.nii.gz"
    inference = ["--config_file", "configs/inference.json", "--bundle_root", "."]
    monai("run", *inference, "--inputs", f"['{scan}']", "--output_dir", tmp_path / "theirs", folder=bundle)
    run_prediction([Run.open(run)], [scan], tmp_path / "ours")
    ours, theirs = (nib.load(tmp_path / who / "case_0.nii.gz") for who in ("ours", "theirs"))
    assert np.array_equal(ours.get_fdata(), theirs.get_fdata())
    assert np.array_equal(ours.affine, theirs.affine)
    assert len(np.unique(ours.get_fdata())) > 1


@pytest.mark.parametrize("by", ["source", "weights"])
def test_it_brings_its_artifact_its_norms_and_its_head(config, tmp_path, by):
    torch.manual_seed(0)
    encoder = create_encoder("timm:test_resnet", levels=2)
    path = save_artifact(encoder, tmp_path / "e.safetensors")
    network = {
        "source": [f"network.source={path}"],
        "weights": ["network.source=timm:test_resnet", "network.levels=2", f"network.weights=file:{path}"],
    }[by]
    kinds = ["tuning.batchnorm=group", "network.head=subpixel", "network.decoder_channels=[8]"]
    run = trained(config, tmp_path / "run", *network, "strategy=full", *kinds)
    bundle = export_bundle(Run.open(run), tmp_path / "bundle")
    path.unlink()
    from monai.bundle import ConfigParser

    parser = ConfigParser(json.loads((bundle / "configs" / "inference.json").read_text()))
    parser["bundle_root"] = str(bundle)
    predictor = load_predictor(parser.get_parsed_content("network_def"), bundle)
    assert predictor.logits(torch.rand(1, 16, 16, 16)).shape == (3, 16, 16, 16)


def test_it_is_not_written_over_anything(config, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine.txt").write_text("x")
    run = trained(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="exists already"):
        export_bundle(Run.open(run), tmp_path / "bundle")
    assert (tmp_path / "bundle" / "mine.txt").read_text() == "x"
