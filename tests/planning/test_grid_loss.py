"""What labels keep on a grid is the Dice of the mask that comes back from it."""

import nibabel as nib
import numpy as np
import pytest

from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.planning.grid_loss import kept_by_grid, kept_dice


@pytest.fixture
def case(tmp_path):
    """A cube of 12 voxels of 1 mm, a sheet one voxel thick, and a label that is not there."""
    label = np.zeros((24, 24, 24), np.uint8)
    label[3:15, 3:15, 3:15] = 1
    label[19, 2:22, 2:22] = 2
    path = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(label, np.diag([1.0, 1.0, 1.0, 1.0])), path)
    return Case("one", (path,), path, "one")


def settings(spacing):
    return VolumeSettings("", "MR", labels={"cube": 1, "sheet": 2, "absent": 3}, spacing=spacing)


def test_its_own_grid_keeps_everything(case):
    assert kept_dice(case, settings(None)) == kept_dice(case, settings([1.0] * 3)) == {"cube": 1, "sheet": 1}


def test_a_coarse_grid_costs_what_is_thin(case):
    kept = kept_dice(case, settings([3.0, 3.0, 3.0]))
    assert kept["sheet"] < 0.6 < 0.9 < kept["cube"] <= 1


def test_a_cohort_is_told_by_its_mean_and_worst(case):
    alone = kept_dice(case, settings([3.0] * 3))
    kept = kept_by_grid([case, case], settings([3.0] * 3), workers=1)
    assert kept == {name: {"worst": dice, "mean": dice} for name, dice in alone.items()}
    assert kept_by_grid([Case("bare", case.images, None, "bare")], settings([3.0] * 3), workers=1) == {}
