"""A tiny cohort on disk and a config that trains on it in seconds."""

import json
import warnings
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


@pytest.fixture
def config(cohort, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(root=cohort))
    return path


def with_handler(monkeypatch, event, action) -> None:
    """Let each trainer that is built from now on call `action` at an event."""
    from medi3d.transfer import training

    build = training.build_trainer

    def built(*arguments, **options):
        trainer = build(*arguments, **options)
        trainer.add_event_handler(event, action)
        return trainer

    monkeypatch.setattr(training, "build_trainer", built)


def kill(_) -> None:
    """Ends a run at an event, as Ctrl-C would."""
    raise KeyboardInterrupt
