"""Choices follow the cohort, leave what is given, and a grid spares the labels."""

from dataclasses import replace

import pytest

from medi3d.planning.choices import plan_data, spare_labels, symmetric_pairs
from medi3d.planning.fingerprint import CaseFacts, Fingerprint


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


@pytest.mark.parametrize(("depth", "planned"), [(2.5, True), (1.8, False)])
def test_where_cubes_give_way_to_thick_voxels_depth_is_held_back(depth, planned):
    fingerprint = cohort((depth, 1.0, 1.0))
    choices = spare_labels(
        plan_data(fingerprint, {}, ["a"]), fingerprint, lambda spacing: {"a": {"mean": spacing[0] / 3}}
    )
    plans = [choice.value for choice in choices if choice.key == "network.plan"]
    assert plans == [{"from_spacing": [depth, 1.0, 1.0]}] * planned


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.5, 0.5)], ids=["own grid", "thick slices"])
def test_other_grids_are_left_alone(spacing):
    choices = plan_data(cohort(spacing), {}, ["a"])
    assert spare_labels(choices, cohort(spacing), lambda _: pytest.fail("asked")) == choices


def test_what_is_given_is_kept():
    given = {"data.spacing": [9.0] * 3}
    assert chosen(cohort((5.0, 1.0, 1.0), low=-50.0), given) == {}


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
