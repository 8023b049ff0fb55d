"""A prediction that is killed at random, again and again, ends in the files of one that never was."""

from multiprocessing.process import BaseProcess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.killing import content, kill_at_random
from tests.processes import fresh_processes

KILLS, CASES = 20, 8


def predict_all(scans: Path, out: Path) -> None:
    """What runs in a process of its own."""
    from medi3d.datasets.images.settings import VolumeSettings
    from medi3d.engine.inference import SlidingWindow
    from medi3d.engine.precision import Precision
    from medi3d.prediction.predict import predict_files
    from medi3d.prediction.predictor import Predictor

    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Conv3d(4, 3, 3, padding=1))
    precision = Precision(torch.device("cpu"), bf16=False)
    settings = VolumeSettings(root="", modality="MR", labels={"a": 1, "b": 2}, spacing=[1.0, 1.0, 1.0])
    predictor = Predictor(settings, network, SlidingWindow((8, 16, 16)), precision, identity="tiny")
    _, failed = predict_files([predictor], [scans], out)
    assert len(failed) == 1


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    (tmp_path / "scans").mkdir()
    for number in range(CASES):
        values = np.random.default_rng(number).normal(size=(30, 28, 12)).astype(np.float32)
        suffix = [".nii.gz", ".nii"][number % 2]
        nib.save(nib.Nifti1Image(values, np.diag([1, 1, 2.5, 1])), tmp_path / "scans" / f"{number}{suffix}")
    (tmp_path / "scans" / "broken.nii").write_bytes(b"nothing")
    context = fresh_processes()

    def start(out: str) -> BaseProcess:
        process = context.Process(target=predict_all, args=(tmp_path / "scans", tmp_path / out))
        process.start()
        return process

    def whole(name: str, data: bytes) -> None:
        being_written = name.startswith(".records/") or Path(name).name.startswith(".")
        if name.endswith((".nii", ".nii.gz")) and not being_written:
            assert data == content(tmp_path / "undisturbed")[name], "a partial mask looks complete"

    kill_at_random(start, tmp_path, KILLS, whole)
