"""A file that medi3d did not write is never replaced or removed; what it wrote is known by its content."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from medi3d.datasets.images.settings import VolumeSettings
from medi3d.engine.inference import single_forward
from medi3d.engine.precision import Precision
from medi3d.errors import ConfigError
from medi3d.files import alone_in
from medi3d.prediction.predict import PredictionOptions, predict_files
from medi3d.prediction.predictor import Predictor


class Threshold(nn.Module):
    def forward(self, x):
        return torch.cat([-x, x], dim=1)


class Broken(Threshold):
    def forward(self, x):
        return super().forward(x) * float("nan")


DATA = VolumeSettings(root="", modality="MR", labels={"bright": 1})
PREDICTOR = Predictor(
    DATA, Threshold(), single_forward, Precision(torch.device("cpu"), bf16=False), name="run"
)


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "scans" / "a.nii.gz"
    path.parent.mkdir()
    values = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    return path


def predict(scan, out, predictor=PREDICTOR, **options):
    return predict_files([predictor], [scan], out, PredictionOptions(**options))


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("kind", ["file", "link", "folder", "corrected by hand"])
def test_what_medi3d_did_not_write_is_left_alone(scan, tmp_path, kind, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    target, mine = out / "a.nii.gz", tmp_path / "mine"
    mine.write_text("mine")
    if kind == "file":
        target.write_text("mine")
    elif kind == "link":
        target.symlink_to(mine)
    elif kind == "folder":
        target.mkdir()
    else:
        predict(scan, out)
        target.write_text("mine")
    written, failed = predict(scan, out, overwrite=overwrite)
    assert written == []
    assert "a.nii.gz: exists, and medi3d did not write it so; move it away" in failed[0]
    assert target.is_dir() or target.read_text() == "mine"
    assert target.is_symlink() == (kind == "link")
    assert mine.read_text() == "mine"


def test_a_damaged_scan_does_not_cost_a_hand_made_mask(scan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.nii.gz").write_text("mine")
    scan.write_bytes(b"damaged")
    _, failed = predict(scan, out)
    assert len(failed) == 1
    assert (out / "a.nii.gz").read_text() == "mine"


def test_an_output_folder_that_holds_the_scan_is_refused(scan):
    before = scan.read_bytes()
    with pytest.raises(ConfigError, match="lies in the output folder"):
        predict(scan, scan.parent)
    assert scan.read_bytes() == before


def test_its_own_masks_are_kept_and_replaced(scan, tmp_path):
    out = tmp_path / "out"
    (first,), _ = predict(scan, out)
    seen = first.stat().st_mtime_ns
    predict(scan, out)
    assert first.stat().st_mtime_ns == seen
    (again,), failed = predict(scan, out, overwrite=True)
    assert not failed
    assert again.stat().st_mtime_ns != seen
    (other,), _ = predict(scan, out, dataclasses.replace(PREDICTOR, identity="other"))
    assert other == first


def test_another_table_of_that_name_is_left_alone(scan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.csv").write_text("patient,outcome\n1,2\n")
    with pytest.raises(ConfigError, match="not a table of medi3d"):
        predict(scan, out)
    assert "outcome" in (out / "predictions.csv").read_text()


def test_a_folder_that_another_process_writes_into_is_refused(scan, tmp_path):
    with alone_in(tmp_path / "out" / ".records", "writing masks"):  # noqa: SIM117
        with pytest.raises(ConfigError, match="another process is writing masks"):
            predict(scan, tmp_path / "out")


def test_what_a_killed_program_left_is_swept(scan, tmp_path):
    left = tmp_path / "out" / ".records" / "new-abc"
    left.mkdir(parents=True)
    (left / "a.nii.gz").write_text("half")
    predict(scan, tmp_path / "out")
    assert not left.exists()


def test_voxels_in_a_file_of_their_own_belong_to_the_scan(tmp_path):
    path = tmp_path / "a.mhd"
    path.write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementSpacing = 1 1 1\n"
        "ElementType = MET_FLOAT\nElementDataFile = a.raw\n"
    )
    values = np.random.default_rng(0).normal(size=64).astype(np.float32)
    values.tofile(tmp_path / "a.raw")
    (mask,), _ = predict(path, tmp_path / "out")
    before = mask.read_bytes()
    (-values).tofile(tmp_path / "a.raw")
    (mask,), failed = predict(path, tmp_path / "out")
    assert not failed
    assert mask.read_bytes() != before


def test_a_network_that_gives_nan_makes_no_mask(scan, tmp_path):
    broken = dataclasses.replace(PREDICTOR, network=Broken())
    written, failed = predict(scan, tmp_path / "out", broken)
    assert written == []
    assert "gives NaN" in failed[0]
    assert not (tmp_path / "out" / "a.nii.gz").exists()
