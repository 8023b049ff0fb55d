"""`--memory` against the peak of resident memory that the system counts, in a process of its own."""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from tests.processes import fresh_processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")

SHAPES = {"small.nii": (100, 90, 80), "middle.nii.gz": (130, 120, 110), "large.nrrd": (160, 150, 140)}

LIMITS = {
    "less than the program holds": (lambda needs: -1e8, 0, "the program holds"),
    "less than any scan needs": (lambda needs: 0.9 * needs[0], 0, "needs about"),
    "less than the largest needs": (lambda needs: (needs[1] + needs[2]) / 2, 2, "needs about"),
    "one scan at a time": (lambda needs: 1.05 * needs[2], 3, ""),
    "all scans": (lambda needs: 1.05 * sum(needs), 3, ""),
}
"""Name -> (bytes beyond what the program and its windows take, by what the scans need; masks; reason)."""


@dataclass(frozen=True)
class Outcome:
    limit: float
    peak: float
    done: int
    failed: list[str]


def predict_under_limits(scans: Path, out: Path, answer) -> None:
    """What runs in a process of its own: an `Outcome` for each of `LIMITS`, in GB."""
    from medi3d.datasets.images.files import read_header
    from medi3d.datasets.images.settings import VolumeSettings
    from medi3d.engine.inference import SlidingWindow
    from medi3d.engine.precision import Precision
    from medi3d.errors import ConfigError
    from medi3d.prediction.memory import band_bytes, batch_of, forward_bytes, reading_bytes, resident_bytes
    from medi3d.prediction.predict import PredictionOptions, predict_files
    from medi3d.prediction.predictor import Predictor

    torch.set_num_threads(1)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 1), torch.nn.Conv3d(8, 7, 1))
    precision = Precision(torch.device("cpu"), bf16=False)
    labels = {str(value): value for value in range(1, 7)}
    settings = VolumeSettings(root="", modality="MR", labels=labels, spacing=[1.0, 1.0, 1.0])
    predictor = Predictor(settings, network, SlidingWindow((48, 96, 96)), precision, identity="tiny")
    windows = forward_bytes(predictor.windowed, torch.zeros(batch_of(predictor)))
    headers = [read_header(scans / name) for name in SHAPES]
    needs = [reading_bytes(one, settings) + band_bytes(one, predictor) for one in headers]
    for name, (beyond, *_) in LIMITS.items():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        limit = (resident_bytes() + windows + beyond(needs)) / 1e9
        try:
            options = PredictionOptions(memory_gb=limit, overwrite=True)
            done, failed = predict_files([predictor], [scans], out / name, options)
        except ConfigError as error:
            done, failed = [], [str(error)]
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
        answer.send(Outcome(limit, peak / 1e9, len(done), failed))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    folder, out = tmp_path_factory.mktemp("scans"), tmp_path_factory.mktemp("masks")
    for number, (name, shape) in enumerate(SHAPES.items()):
        values = np.random.default_rng(number).normal(size=shape).astype(np.int16)
        if name.endswith(".nrrd"):
            sitk.WriteImage(sitk.GetImageFromArray(values.T), str(folder / name))
        else:
            nib.save(nib.Nifti1Image(values, np.diag([0.8, 0.9, 1.3, 1])), folder / name)
    context = fresh_processes()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=predict_under_limits, args=(folder, out, sending))
    process.start()
    sending.close()
    found = {name: receiving.recv() for name in LIMITS}
    process.join()
    return found


@pytest.mark.parametrize("name", LIMITS)
def test_the_peak_keeps_below_the_limit(outcomes, name):
    _, masks, reason = LIMITS[name]
    found = outcomes[name]
    assert found.done == masks, found
    assert bool(found.failed) == bool(reason)
    assert all("--memory" in line and reason in line for line in found.failed)
    assert found.peak <= found.limit or not masks, found
