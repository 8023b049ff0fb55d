"""A tiny cohort and tiny clips on disk, and configs that train on them in seconds."""

import json
import warnings
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

with warnings.catch_warnings():  # Ignite imports modules of torch that warn of torch.jit
    warnings.simplefilter("ignore", DeprecationWarning)
    import ignite.engine  # noqa: F401

CONFIG = """
task: segmentation
name: tiny
strategy: original
data:
  root: {root}
  modality: MR
  labels: {{low: 1, high: 2}}
  patch: [16, 16, 16]
  validation: 3
augmentation: {{noise: 0.5}}
network: {{source: unet}}
training: {{steps: 4, batch_size: 2, validate_every: 2, precision: fp32}}
"""

CLIPS_CONFIG = """
task: classification
name: clips
strategy: original
data: {{root: {root}, frames: 8, side: 32, crop: 32}}
network: {{source: "timm:test_resnet", plan: planar, in_channels: 3, levels: 3, dropout: 0.0}}
training: {{steps: 40, batch_size: 4, learning_rate: 0.02, encoder_factor: 1.0, validate_every: 20}}
"""


def write_clips(root: Path, takes: int = 1) -> Path:
    """`takes` clips of each of three scenes of each of two classes: bright above, or bright below."""
    av = pytest.importorskip("av")
    rng = np.random.default_rng(0)
    for name, scene, take in product(("above", "below"), (1, 2, 3), range(1, takes + 1)):
        path = root / name / f"v_{name}_g{scene:02d}_c{take:02d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = rng.integers(0, 80, (10, 32, 32, 3), dtype=np.uint8)
        frames[:, slice(0, 16) if name == "above" else slice(16, 32)] += 150
        with av.open(path, "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode())
    return root


def write_cohort(root: Path, count: int = 8) -> Path:
    """Cases of noise with a bright block, split into a lower and an upper half; MSD layout."""
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    rows = []
    for index in range(count):
        label = np.zeros((16, 18, 14), np.uint8)
        label[4:12, 5:13, 3:7], label[4:12, 5:13, 7:11] = 1, 2
        image = (rng.normal(size=label.shape) + 3 * label).astype(np.float32)
        name = f"case_{index}.nii.gz"
        for part, array in (("imagesTr", image), ("labelsTr", label)):
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), root / part / name)
        rows.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    listing = {"name": "tiny", "labels": {"0": "background", "1": "low", "2": "high"}, "training": rows}
    (root / "dataset.json").write_text(json.dumps(listing))
    return root


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Six clips, one of each scene."""
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def config(cohort, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(root=cohort))
    return path


def with_handler(monkeypatch, event, action) -> None:
    """Let each trainer that is built from now on call `action` at an event."""
    from medi3d.training import train as training

    build = training.build_trainer

    def built(*arguments, **options):
        trainer = build(*arguments, **options)
        trainer.add_event_handler(event, action)
        return trainer

    monkeypatch.setattr(training, "build_trainer", built)


def kill(_) -> None:
    """Ends a run at an event, as Ctrl-C would."""
    raise KeyboardInterrupt
