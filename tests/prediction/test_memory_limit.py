"""`--memory` against the peak of resident memory that the system counts, in a process of its own."""

import multiprocessing
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc"),
]

SHAPE, SCANS = (200, 190, 180), 3


def predict_under(limit_gb: float, scans: Path, out: Path, answer) -> None:
    """What runs in a process of its own: sends masks, failures, and the peak in GB."""
    from medi3d.datasets.images.settings import VolumeSettings
    from medi3d.engine.inference import SlidingWindow
    from medi3d.engine.precision import Precision
    from medi3d.errors import ConfigError
    from medi3d.prediction.predict import PredictionOptions, predict_files
    from medi3d.prediction.predictor import Predictor

    torch.set_num_threads(1)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 1), torch.nn.Conv3d(8, 7, 1))
    precision = Precision(torch.device("cpu"), bf16=False)
    labels = {str(value): value for value in range(1, 7)}
    settings = VolumeSettings(root="", modality="MR", labels=labels, spacing=[1.0, 1.0, 1.0])
    predictor = Predictor(settings, network, SlidingWindow((48, 96, 96)), precision, identity="tiny")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    try:
        done, failed = predict_files([predictor], [scans], out, PredictionOptions(memory_gb=limit_gb))
    except ConfigError as error:
        done, failed = [], [str(error)]
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    answer.send((len(done), failed, peak / 1e9))


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for number, suffix in zip(range(SCANS), (".nii", ".nii.gz", ".nrrd"), strict=True):
        values = np.random.default_rng(number).normal(size=SHAPE).astype(np.int16)
        path = folder / f"{number}{suffix}"
        if suffix == ".nrrd":
            sitk = pytest.importorskip("SimpleITK")
            sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
        else:
            nib.save(nib.Nifti1Image(values, np.diag([0.8, 0.9, 1.3, 1])), path)
    return folder


@pytest.mark.parametrize("limit", [0.3, 1.2, 1.5, 2.0, 3.0])
def test_the_peak_keeps_below_the_limit(limit, scans, tmp_path):
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=predict_under, args=(limit, scans, tmp_path, sending))
    process.start()
    sending.close()
    done, failed, peak = receiving.recv()
    process.join()
    print(f"limit {limit} GB: {done} masks, peak {peak:.2f} GB; {failed[:1]}")
    assert done + len(failed) == SCANS or done == 0
    assert all("--memory" in line for line in failed)
    assert peak <= limit or not done
    assert done == SCANS or limit < 3
