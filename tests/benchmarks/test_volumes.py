"""The benchmark of volumes compares what it says: same network, same windows, same labels."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("volume_rivals")


@pytest.fixture
def prediction(bench):
    return importlib.import_module("prediction")


def test_the_phantom_has_every_organ_at_its_value(bench):
    image, label = bench.phantom((48, 40, 44))
    assert image.dtype == np.int16
    assert sorted(np.unique(label)) == [0, *bench.ORGANS]
    for number, value in bench.ORGANS.items():
        assert image[label == number].mean() == pytest.approx(value, abs=bench.NOISE)


def test_the_lowest_dice_counts(bench):
    first = np.zeros((4, 4, 4), np.uint8)
    first[0] = np.array([*bench.ORGANS, *range(10)]).reshape(4, 4) % 7
    assert bench.dice(first, first) == 1
    other = first.copy()
    other[other == 3] = 0
    assert bench.dice(first, other) == 0


def test_patches_are_those_of_the_phantom(bench):
    scans = [bench.phantom((48, 48, 48), seed) for seed in (1, 2)]
    images, labels = bench.batch(scans, np.random.default_rng(0))
    assert images.shape == (2, 1, 48, 48, 48)
    assert sorted(int((label == 1).sum()) for label in labels) == sorted(
        int((label == 1).sum()) for _, label in scans
    )
    inside = 1000 * images[:, 0][labels == 2]
    assert inside.mean() == pytest.approx(bench.ORGANS[2], abs=bench.NOISE)


def test_ratios_are_taken_turn_by_turn(bench):
    seconds = {"a": {"cpu": [1.0, 10.0, 2.0]}, "b": {"cpu": [2.0, 30.0, 4.0]}}
    assert bench.ratio(seconds, "b", "a", "cpu") == 2.0
    found = bench.turns({"a": lambda: None, "b": lambda: sum(range(10**5))}, 3)
    assert [len(found[name]["wall"]) for name in "ab"] == [3, 3]


def test_medi3d_and_monai_see_the_same_windows(prediction, monkeypatch):
    net = torch.nn.Conv3d(1, 7, 3, padding=1)
    monkeypatch.setattr(prediction, "nnunet_predictor", lambda *_: None)
    ways = prediction.predictors(net, (8, 8, 8))
    image = torch.randn(1, 20, 12, 17)
    masks = [ways[name](image) for name in ("medi3d in float32", "MONAI, 1 at once", "MONAI, 4 at once")]
    assert masks[0].shape == image.shape[1:]
    assert all((mask == masks[0]).mean() > 0.999 for mask in masks[1:])


@pytest.mark.parametrize(
    ("script", "options"),
    [("preprocessing.py", ["--data", "."]), ("prediction.py", [])],
    ids=["preprocessing", "prediction"],
)
def test_missing_peers_are_told_in_one_line(script, options, tmp_path):
    if importlib.util.find_spec("nnunetv2") is not None:
        pytest.skip("nnU-Net is installed")
    command = [sys.executable, BENCHMARKS / script, *options, "--peers", tmp_path]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "give --peers FOLDER" in answer.stderr
