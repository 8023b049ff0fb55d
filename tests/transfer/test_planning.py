"""Choices follow the cohort, leave what is given, and a patch keeps to the memory."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from medi3d.datasets.fingerprint import CaseFacts, Fingerprint
from medi3d.errors import ConfigError, Medi3dError
from medi3d.transfer import planning
from medi3d.transfer.planning import plan_data, plan_patch, spare_labels, symmetric_pairs


def cohort(spacing=(1.0, 1.0, 1.0), shape=(40, 50, 60), low=0.0) -> Fingerprint:
    facts = CaseFacts(
        "a",
        shape,
        spacing,
        "LPS",
        "0",
        [{"low": low, "high": 900.0}],
        [[float(v) for v in range(101)]],
        {},
        {},
        {},
    )
    return Fingerprint([facts], [])


def chosen(fingerprint, given=(), labels=("a", "b")) -> dict:
    return {choice.key: choice.value for choice in plan_data(fingerprint, dict(given), labels)}


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ((1.0, 1.0, 1.0), None),
        ((1.0, 1.0, 1.005), None),
        ((4.0, 2.0, 1.0), [2.0, 2.0, 2.0]),
        ((2.0, 0.5, 0.5), [2.0, 0.5, 0.5]),
        ((0.5, 2.0, 2.0), [1.26, 1.26, 1.26]),
    ],
    ids=["cubes", "nearly cubes", "isotropic", "thick slices", "thick in-plane"],
)
def test_spacing_is_isotropic_unless_slices_are_thick(spacing, expected):
    choices = chosen(cohort(spacing))
    assert choices["data.spacing"] == expected
    thick = spacing == (2.0, 0.5, 0.5)
    assert ("network.plan" in choices) == ("augmentation.in_plane" in choices) == thick


@pytest.mark.parametrize(
    ("cubes", "median", "depths", "expected"),
    [
        (0.96, 1.0, (4.0, 4.0, 4.0), [2.0] * 3),
        (0.9, 0.96, (4.0, 4.0, 4.0), [4.0, 2.0, 1.0]),
        (0.9, 0.94, (2.0, 4.0, 4.1), [4.0, 2.0, 1.0]),
        (0.9, 0.89, (2.0, 4.0, 4.1), [2.0] * 3),
        (0.9, 0.94, (3.0, 4.0, 4.1), None),
    ],
    ids=["little lost", "median better", "cases differ", "median worse", "cases alike"],
)
def test_cubes_give_way_to_a_grid_that_costs_labels_less(cubes, median, depths, expected):
    keeps = {2.0: cubes, 4.0: median}
    cases = [replace(cohort((depth, 2.0, 1.0)).cases[0], name=str(depth)) for depth in depths]
    fingerprint = Fingerprint(cases, [])

    def kept_by(spacing):
        return {"thin": {"mean": keeps[spacing[0]]}, "thick": {"mean": 1.0}}

    choices = spare_labels(plan_data(fingerprint, {}, ["a"]), fingerprint, kept_by)
    (grid,) = (choice for choice in choices if choice.key == "data.spacing")
    assert grid.value == expected
    assert ("thin keeps a Dice of 0.900" in grid.why) == (expected != [2.0] * 3)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.5, 0.5)], ids=["own grid", "thick slices"])
def test_other_grids_are_left_alone(spacing):
    choices = plan_data(cohort(spacing), {}, ["a"])
    assert spare_labels(choices, cohort(spacing), lambda _: pytest.fail("asked")) == choices


def test_ct_takes_its_window_from_labelled_voxels_and_mr_each_case_its_own():
    assert chosen(cohort(low=-1000.0))["data.normalisation"] == {"method": "window", "window": [0.0, 100.0]}
    assert chosen(cohort())["data.normalisation"] == {"method": "percentile"}


def test_what_is_given_is_kept():
    given = {"data.spacing": [9.0] * 3, "data.normalisation": {}, "data.modality": "MR"}
    assert chosen(cohort((5.0, 1.0, 1.0), low=-50.0), given) == {}


def test_an_unclear_modality_is_asked_for():
    with pytest.raises(ConfigError, match="not clear from the images"):
        chosen(cohort(low=-50.0))


@pytest.mark.parametrize(
    ("labels", "pairs"),
    [
        (["LeftParotid", "Mandible", "RightParotid"], [["LeftParotid", "RightParotid"]]),
        (["kidney_l", "kidney_r"], [["kidney_l", "kidney_r"]]),
        (["lung left", "lung right", "heart"], [["lung left", "lung right"]]),
        (["left", "right"], [["left", "right"]]),
        (["liver", "bright"], []),
        (["left atrium", "left ventricle"], []),
    ],
    ids=lambda value: str(value),
)
def test_labels_of_two_sides_are_found_by_their_names(labels, pairs):
    assert symmetric_pairs(labels) == pairs
    assert ("augmentation.flip_axes" in chosen(cohort(), labels=labels)) == bool(pairs)


@pytest.fixture
def step(monkeypatch):
    """A training step that takes 100 MB and 3 kB a voxel; the patches on which it was measured."""
    measured = []

    def measure(experiment, patch):
        measured.append(patch)
        return 100e6 + 3e3 * patch[0] * patch[1] * patch[2]

    monkeypatch.setattr(planning, "measure_step", measure)
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

    monkeypatch.setattr(planning, "measure_step", measure)
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
    with pytest.raises(Medi3dError, match="give more with --memory"):
        patch_for(cohort(), 0.1)
