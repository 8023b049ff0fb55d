"""A run as a MONAI bundle: a folder that MONAI's own commands verify and run, with medi3d installed.

The bundle's config builds the network by `medi3d.create_segmenter`. Reading, windows and resampling back to
the scan's grid are those of `medi3d predict`, so the masks are the same.
"""

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from omegaconf import OmegaConf
from torch import nn

from medi3d.axes import to_triple
from medi3d.engine.state import read_checkpoint
from medi3d.errors import ConfigError, Medi3dError, WeightsError, first_line
from medi3d.experiment.config import load_resolved
from medi3d.experiment.run import Run
from medi3d.experiment.settings import SegmentationExperiment, segmentation_of
from medi3d.experiment.strategies import CONVERSIONS
from medi3d.experiment.tasks import build_task
from medi3d.export.network import licences_of
from medi3d.files import file_sha256, folder_aside, writing, written_aside
from medi3d.keys import check_inert
from medi3d.models.norms import convert_norms
from medi3d.prediction.postprocessing import read_largest
from medi3d.prediction.predict import predict_files
from medi3d.prediction.predictor import Predictor
from medi3d.training.pretrained_encoder import artifact_of

EXPERIMENT, DECIDED, WEIGHTS = "configs/experiment.yaml", "configs/postprocessing.json", "models/model.pt"
"""Files of a bundle: the run's config, which labels keep their largest component, the weights."""

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
"""The schema against which MONAI's `verify_metadata` checks `metadata.json`."""

README = """# {name}

A segmentation network trained with medi3d {version}, as a MONAI bundle. It needs `medi3d` beside MONAI.

    python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath schema.json
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
        --inputs "['scan.nii.gz']" --output_dir masks

`network_def` in `configs/inference.json` builds the network; `models/model.pt` holds its weights.
Scans are NIfTI, NRRD, MetaImage or DICOM folders; a mask lies on the grid of its scan.
"""


def export_bundle(run: Run, out: Path) -> Path:
    """Write the best network of a segmentation run as a MONAI bundle.

    Args:
        run: a single training.
        out: the bundle's folder: `configs/{metadata,inference}.json`, `configs/experiment.yaml`,
            `models/model.pt`, `docs/README.md`. It must be new or empty.

    Raises:
        ConfigError: the run does not segment, or `out` exists and is not empty.
        WeightsError: the run has no usable checkpoint.
        DataError: `out` cannot be written.
    """
    experiment = segmentation_of(run.experiment, str(run.folder))
    check_inert(str(run.config), OmegaConf.to_container(OmegaConf.structured(experiment)))
    checkpoint = read_checkpoint(run.best)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already; give a new folder for the bundle")
    with writing(out), folder_aside(out) as aside:
        for part in ("configs", "models", "docs"):
            (aside / part).mkdir()
        _write_json(aside / "configs" / "inference.json", _inference(experiment, aside))
        shutil.copy(run.config, aside / EXPERIMENT)
        if run.largest.is_file():
            shutil.copy(run.largest, aside / DECIDED)
        torch.save(checkpoint["network"], aside / WEIGHTS)
        readme = README.format(name=experiment.name, version=version("medi3d"))
        (aside / "docs" / "README.md").write_text(readme)
        licences = licences_of(_build(aside))
        metadata = {**_metadata(experiment, checkpoint), "weights_licences": licences}
        _write_json(aside / "configs" / "metadata.json", metadata)
    return out


def _build(bundle: Path) -> nn.Module:
    """Build the network from the config as MONAI will, and load its weights."""
    parser = ConfigParser(json.loads((bundle / "configs" / "inference.json").read_text()))
    parser["bundle_root"] = str(bundle)
    network = parser.get_parsed_content("network_def")
    load_predictor(network, bundle)
    return network


def _write_json(path: Path, content: Any) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")


def _inference(experiment: SegmentationExperiment, folder: Path) -> dict[str, Any]:
    """The bundle's `inference.json`; files that its network needs are copied into `folder`."""
    network: dict[str, Any] = {"_target_": "medi3d.create_segmenter", **_network(experiment, folder)}
    if experiment.tuning.batchnorm in CONVERSIONS:
        target = "medi3d.export.bundle.with_norms"
        network = {"_target_": target, "network": network, "norm": experiment.tuning.batchnorm}
    return {
        "bundle_root": ".",
        "inputs": [],
        "output_dir": "$@bundle_root + '/eval'",
        "network_def": network,
        "predictor": {
            "_target_": "medi3d.export.bundle.load_predictor",
            "network": "@network_def",
            "bundle": "@bundle_root",
        },
        "masks": {
            "_target_": "medi3d.export.bundle.predict",
            "predictor": "@predictor",
            "inputs": "@inputs",
            "out": "@output_dir",
        },
        "run": ["$@masks"],
    }


def _network(experiment: SegmentationExperiment, folder: Path) -> dict[str, Any]:
    """Arguments of `create_segmenter` for the network of the checkpoint; published weights are not read."""
    settings = experiment.network
    weights = None if experiment.strategy == "original" else settings.weights
    source, options = settings.source, settings.encoder_options()
    artifact = artifact_of(experiment) if experiment.strategy != "original" else None
    if artifact is not None:
        shutil.copy(artifact, folder / "models" / "encoder.safetensors")
        inside = "@bundle_root + '/models/encoder.safetensors'"
        source, weights = (
            (f"${inside}", None) if source.endswith(".safetensors") else (source, f"$'file:' + {inside}")
        )
    elif weights is not None and weights.startswith("file:"):
        weights = None  # it has no input contract, and the checkpoint replaces its weights
    if str(settings.plan).endswith((".yaml", ".yml")):
        shutil.copy(str(settings.plan), folder / "configs" / "plan.yaml")
        options["plan"] = "$@bundle_root + '/configs/plan.yaml'"
    return {
        "encoder_or_source": source,
        "num_classes": len(experiment.data.label_names) + 1,
        **settings.decoder_options(),
        "weights": weights,
        "read_weights": False,
        **options,
    }


def _metadata(experiment: SegmentationExperiment, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The bundle's `metadata.json`, by MONAI's schema."""
    data, window = experiment.data, to_triple(experiment.prediction.window or experiment.data.patch, "window")
    names = ["background", *data.label_names]
    shared = {"type": "image", "dtype": "float32", "spatial_shape": list(window), "is_patch_data": True}
    image = {
        "format": "hounsfield" if data.modality == "CT" else "magnitude",
        "modality": ", ".join(dict.fromkeys(c.modality for c in data.by_channel)) or data.modality,
        "num_channels": data.channels,
        "value_range": [-1, 1],
        "channel_def": {str(number): "image" for number in range(data.channels)},
    }
    pred = {
        "format": "segmentation",
        "num_channels": len(names),
        "value_range": [0, 1],
        "channel_def": {str(number): name for number, name in enumerate(names)},
    }
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by medi3d after {checkpoint['step']} steps"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch"),
        "numpy_version": version("numpy"),
        "required_packages_version": {"medi3d": version("medi3d")},
        "name": experiment.name,
        "task": f"Segmentation of {', '.join(data.label_names)} in {data.modality} volumes",
        "description": f"{experiment.network.source} in 3D with a U-Net decoder, trained with medi3d",
        "authors": "not stated",
        "copyright": "not stated",
        "network_data_format": {
            "inputs": {"image": {**shared, **image}},
            "outputs": {"pred": {**shared, **pred}},
        },
    }


def with_norms(network: nn.Module, norm: str) -> nn.Module:
    """The segmenter with instance or group norm in its encoder, as `tuning.batchnorm` set it in training."""
    convert_norms(network.encoder, norm)  # type: ignore[arg-type]
    return network


def load_predictor(network: nn.Module, bundle: str | Path) -> Predictor:
    """The network of a bundle with its weights, ready to predict scans.

    Raises:
        WeightsError: `models/model.pt` is missing, damaged, or of another network.
    """
    bundle = Path(bundle)
    path = bundle / WEIGHTS
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise WeightsError(f"{path}: not the weights of this network ({first_line(error)})") from error
    experiment = load_resolved(bundle / EXPERIMENT)
    largest = read_largest(bundle / DECIDED)
    return Predictor.of(experiment, build_task(experiment), network, file_sha256(path), largest, str(bundle))


def predict(predictor: Predictor, inputs: Sequence[str], out: str) -> list[str]:
    """Write the masks of scans into a folder, as `medi3d predict` does; returns their paths.

    Raises:
        ConfigError: there is no input.
        Medi3dError: scans failed; the message has a line for each. The masks of the others are written.
    """
    if not inputs:
        raise ConfigError("inputs is empty: give scans, --inputs \"['scan.nii.gz']\"")
    written, failed = predict_files([predictor], [Path(p) for p in inputs], Path(out))
    if failed:
        raise Medi3dError("; ".join(failed))
    return [str(path) for path in written]
