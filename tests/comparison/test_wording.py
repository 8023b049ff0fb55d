"""The words of a comparison follow from its intervals."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from medi3d.comparison.findings import Finding
from medi3d.comparison.grid import Point
from medi3d.comparison.wording import answer, place, points, speed
from medi3d.evaluation.statistics import paired_effect


def finding(mean, labels=4):
    """Three seeds, ten cases, differences about `mean`."""
    differences = mean + 0.005 * np.random.default_rng(0).normal(size=(3, 10))
    point = Point("i3d", "kinetics", "full", labels, 0, 0, "short")
    reference = Point("i3d", "scratch", "original", labels, 0, 0, "short")
    return Finding(point, reference, paired_effect(differences), 0.8, 0.8 - mean, 0.01, 0.5, {})


@pytest.mark.parametrize(
    ("means", "words"),
    [
        ([], "No arm can be compared"),
        ([0.0], "No difference seen in the one comparison;"),
        ([-0.09], "The arm is worse than the reference: -9"),
        (
            [0.0, 0.05],
            "Of 2 comparisons with the reference, the arm was better in 1, and no difference was seen in 1",
        ),
        ([0.05, -0.09, 0.07], "better in 2 and worse in 1; the largest clear difference is -9"),
    ],
    ids=["nothing", "none", "one alone", "one", "both ways"],
)
def test_the_answer_counts_verdicts(means, words):
    assert words in answer([finding(mean) for mean in means])


def test_clear_arms_are_named_as_long_as_they_are_few():
    said = answer([finding(0.05), finding(-0.09, labels=0), finding(0.0)])
    assert re.search(r"Better: kinetics \(i3d, full, 4 labels, short\) \+(4\.9|5\.0)\. Worse: kinetics", said)
    assert re.search(r"Worse: kinetics \(i3d, full, all labels, short\) -9\.[01]\.$", said)
    overall = replace(finding(0.05), over=(4, 8))
    assert "Better: kinetics (i3d, full, short) +" in answer([overall, overall])
    assert "Better: " not in answer([finding(0.05)] * 9) + answer([finding(0.05), finding(0.0)])


def test_no_difference_comes_with_what_could_have_been_seen():
    unseen = finding(0.0)
    assert f"{100 * unseen.effect.detectable:.1f} Dice points" in answer([unseen])


def test_a_design_that_can_show_nothing_says_so():
    single = replace(finding(0.0), effect=paired_effect(np.array([[0.1]])))
    assert "cannot show one" in answer([single])


def test_an_effect_is_told_with_its_interval_and_place():
    clear = finding(0.05, labels=0)
    assert points(clear).startswith("+5.0 Dice points, +4.") or points(clear).startswith(
        "+4.9 Dice points, +4."
    )
    assert place(clear) == "i3d: kinetics, full, all labels, short"


def test_what_was_never_reached_is_never():
    assert (speed(0.456), speed(math.inf)) == ("0.46 ×", "never")
