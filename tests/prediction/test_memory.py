"""The memory of a forward pass is counted, and cases keep to one budget."""

import threading

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from medi3d.datasets.images.files import read_header
from medi3d.datasets.images.preprocessing import load_image
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import Medi3dError
from medi3d.prediction.memory import WORKSPACE, MemoryBudget, forward_bytes, reading_bytes, resident_bytes


def test_the_peak_is_that_of_the_two_largest_neighbours():
    network = nn.Sequential(nn.Conv3d(1, 8, 1), nn.Conv3d(8, 4, 1), nn.Conv3d(4, 2, 1))
    image = torch.zeros(1, 1, 6, 6, 6)
    assert forward_bytes(network, image) == (8 + 4) * image.nbytes * WORKSPACE + image.nbytes


def test_what_is_freed_counts_no_more():
    image = torch.zeros(1, 1, 6, 6, 6)
    chain = nn.Sequential(*(nn.Conv3d(1, 1, 1) for _ in range(9)))
    assert forward_bytes(chain, image) == 2 * image.nbytes * WORKSPACE + image.nbytes


def test_a_case_waits_until_its_part_is_free():
    budget, order = MemoryBudget(10), []
    budget.take(7, "first")

    def second():
        budget.take(5, "second")
        order.append("second")

    waiting = threading.Thread(target=second)
    waiting.start()
    order.append("first")
    budget.give_back(7)
    waiting.join(5)
    assert order == ["first", "second"]


def test_a_case_larger_than_all_is_refused():
    with pytest.raises(Medi3dError, match=r"scan: needs about 2\.00 GB where --memory leaves 1\.00 GB"):
        MemoryBudget(10**9).take(2 * 10**9, "scan")
    MemoryBudget(None).take(10**15, "scan")
    assert resident_bytes() > 10**6


@pytest.mark.parametrize("spacing", [None, [1.0, 1.0, 1.0]], ids=["own grid", "finer grid"])
@pytest.mark.parametrize("channels", [1, 2])
def test_reading_needs_no_less_than_what_is_read(tmp_path, channels, spacing):
    """Twice as many voxels need twice as much, and never less than the arrays that reading ends in."""
    needs = []
    for depth in (8, 16):
        values = np.random.default_rng(0).normal(size=(12, 10, depth, channels)).astype(np.float32)
        path = tmp_path / f"{depth}.nii"
        nib.save(nib.Nifti1Image(values if channels > 1 else values[..., 0], np.diag([1, 1, 2, 1])), path)
        settings = VolumeSettings("", "MR", {"a": 1}, channels=channels, spacing=spacing)
        need, read = reading_bytes(read_header(path), settings), load_image([path], settings)
        assert need >= read.image.nbytes + values.nbytes
        needs.append(need)
    assert needs[1] == pytest.approx(2 * needs[0], rel=1e-3)
