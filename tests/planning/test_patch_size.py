"""A patch is as large as memory allows, a cube in mm, and was measured."""

from types import SimpleNamespace

import pytest

from medi3d.errors import Medi3dError
from medi3d.planning import patch_size
from medi3d.planning.patch_size import plan_patch
from tests.planning.test_choices import cohort


@pytest.fixture
def step(monkeypatch):
    """A training step that takes 100 MB and 3 kB a voxel; the patches on which it was measured."""
    measured = []

    def measure(experiment, patch):
        measured.append(patch)
        return 100e6 + 3e3 * patch[0] * patch[1] * patch[2]

    monkeypatch.setattr(patch_size, "measure_step", measure)
    return measured


def patch_for(fingerprint, gigabytes):
    experiment = SimpleNamespace(data=SimpleNamespace(spacing=None), training=SimpleNamespace(batch_size=2))
    return plan_patch(experiment, fingerprint, gigabytes * 1e9)[0].value


def test_the_patch_is_as_large_as_memory_allows_and_was_measured(step):
    sizes = [patch_for(cohort(shape=(300, 400, 400)), gigabytes) for gigabytes in (0.3, 1, 4)]
    voxels = [depth * height * width for depth, height, width in sizes]
    assert voxels == sorted(voxels)
    assert all(
        0.3 * budget < 100e6 + 3e3 * n <= budget for n, budget in zip(voxels, (3e8, 1e9, 4e9), strict=True)
    )
    assert all(tuple(size) in step and not any(side % 16 for side in size) for size in sizes)


def test_what_small_patches_share_misleads_no_one(monkeypatch):
    measured = {}

    def measure(_, patch):
        measured[tuple(patch)] = 0.47e9 + max(0, 3.3e3 * (patch[0] * patch[1] * patch[2] - 1e5))
        return measured[tuple(patch)]

    monkeypatch.setattr(patch_size, "measure_step", measure)
    chosen_patch = patch_for(cohort((3.0, 4.5, 4.5), (128, 128, 128)), 3)
    assert 2e9 < measured[tuple(chosen_patch)] <= 3e9
    assert max(measured.values()) < 6e9


def test_a_small_case_is_seen_whole(step):
    assert patch_for(cohort(), 8) == [48, 64, 64]


def test_a_patch_is_a_cube_in_millimetres_as_far_as_cases_reach(step):
    depth, height, width = patch_for(cohort((4.0, 1.0, 1.0), (200, 400, 400)), 2)
    assert height == width
    assert 0.5 <= depth * 4 / height <= 1.5


def test_too_little_memory_is_one_error(step):
    with pytest.raises(Medi3dError, match="raise --memory"):
        patch_for(cohort(), 0.1)
