"""Statistics on simulated results whose effect is known."""

import math

import numpy as np
import pytest
from scipy import stats

from medi3d.evaluation import statistics
from medi3d.evaluation.statistics import budget_to_reach, holm, mean_interval, paired_effect, signed_rank


def simulated(rng, effect, seeds, cases, *, between_seeds, between_cases, rest):
    """Differences of a study: its seeds, its cases and each single run vary."""
    return (
        effect
        + between_seeds * rng.normal(size=(seeds, 1))
        + between_cases * rng.normal(size=(1, cases))
        + rest * rng.normal(size=(seeds, cases))
    )


SPREADS = {
    "cases vary most": {"between_seeds": 0.002, "between_cases": 0.02, "rest": 0.01},
    "seeds vary most": {"between_seeds": 0.01, "between_cases": 0.005, "rest": 0.01},
    "seeds vary as means of cases do": {"between_seeds": 0.005, "between_cases": 0.03, "rest": 0.02},
    "noise alone": {"between_seeds": 0.0, "between_cases": 0.0, "rest": 0.02},
}


@pytest.mark.parametrize(("seeds", "cases"), [(3, 40), (5, 20)], ids=["3 x 40", "5 x 20"])
@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_intervals_hold_the_true_effect_as_often_as_they_say(spread, seeds, cases, monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 300)
    monkeypatch.setattr(statistics, "signed_rank", lambda differences: 1.0)
    rng = np.random.default_rng(0)
    effects = [paired_effect(simulated(rng, 0.02, seeds, cases, **spread), i) for i in range(400)]
    held = sum(effect.low <= 0.02 <= effect.high for effect in effects) / len(effects)
    assert 0.90 <= held <= 0.98


def test_an_arm_against_itself_shows_no_difference():
    """Stored runs of one arm under 6 seeds, 3 of them against the other 3, in 20 draws."""
    rng = np.random.default_rng(2)
    cases = 0.85 + 0.05 * rng.normal(size=(1, 40))
    runs = cases + 0.01 * rng.normal(size=(6, 1)) + 0.015 * rng.normal(size=(6, 40))
    verdicts = []
    for draw in range(20):
        order = rng.permutation(6)
        verdicts.append(paired_effect(runs[order[:3]] - runs[order[3:]], draw).verdict)
    assert verdicts.count("no difference seen") >= 18


@pytest.mark.parametrize(("effect", "verdict"), [(0.03, "better"), (-0.03, "worse")])
def test_a_large_effect_is_seen(effect, verdict):
    spread = SPREADS["cases vary most"]
    found = paired_effect(simulated(np.random.default_rng(1), effect, 3, 40, **spread))
    assert found.verdict == verdict
    assert found.p_value < 1e-4


def test_the_detectable_effect_is_seen_four_times_in_five():
    rng, spread = np.random.default_rng(3), SPREADS["cases vary most"]
    pilot = [paired_effect(simulated(rng, 0, 3, 40, **spread), i).detectable for i in range(30)]
    true = float(np.median(pilot))
    seen = [paired_effect(simulated(rng, true, 3, 40, **spread), i).low > 0 for i in range(200)]
    assert 0.7 <= np.mean(seen) <= 0.9


def test_the_interval_of_one_seed_is_students_over_cases():
    differences = np.random.default_rng(0).normal(1, 1, size=(1, 200))
    effect = paired_effect(differences)
    low, high = stats.ttest_1samp(differences[0], 0).confidence_interval()
    assert (effect.low, effect.high) == pytest.approx((low, high), abs=0.02)
    assert math.isnan(effect.seed_deviation)


def test_what_is_equal_differs_by_nothing():
    effect = paired_effect(np.zeros((3, 10)))
    assert (effect.mean, effect.low, effect.high, effect.p_value) == (0, 0, 0, 1)
    assert effect.verdict == "no difference seen"


def test_one_number_says_nothing():
    effect = paired_effect(np.array([[-0.047025]]))
    assert (effect.low, effect.high, effect.verdict) == (-math.inf, math.inf, "no difference seen")


def test_seeds_that_contradict_each_other_hide_what_cases_show():
    """Each run is far from zero on every case: a test over cases alone would be sure."""
    differences = np.array([[0.05], [-0.03], [0.04]]) + 0.001 * np.random.default_rng(0).normal(size=(3, 40))
    effect = paired_effect(differences)
    assert effect.p_value < 1e-6
    assert effect.verdict == "no difference seen"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_signed_rank_is_scipys():
    differences = np.array([0.3, -0.1, 0.4, 0.2, 0.5, 0.25])
    assert signed_rank(differences) == stats.wilcoxon(differences).pvalue


@pytest.mark.parametrize(
    ("target", "budget"),
    [(0.2, 10), (0.5, 15), (0.8, 20), (0.9, math.inf)],
    ids=["first", "between", "at", "never"],
)
def test_budget_to_reach(target, budget):
    curve = [{"step": 10, "dice": 0.2}, {"step": 20, "dice": 0.8}, {"step": 30, "dice": 0.7}]
    assert budget_to_reach(curve, target, "step") == pytest.approx(budget)


def test_intervals_end_where_values_do():
    scores = [1.0, 1.0, 1.0, 0.9, 0.4]
    names = list("abcde")
    free = mean_interval(scores, names)
    assert free[2] > 1
    assert mean_interval(scores, names, bounds=(0, 1)) == (*free[:2], 1)
    effect = paired_effect(np.array([[1.0, 1.0, 0.9, -0.5]]), most=1.0)
    assert (effect.high, effect.low > -1) == (1, True)
