"""One finding of a comparison: an arm, its reference, and the difference between them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medi3d.comparison.grid import Point
from medi3d.comparison.measures import MEASURES, Measure
from medi3d.evaluation.statistics import Effect


@dataclass(frozen=True)
class Finding:
    """One arm against the reference of its group, at one strategy, training-set size and budget.

    Attributes:
        point: place in the grid; its seed and fold are those of the first run and carry no meaning, nor
            does its size where `over` is given.
        reference: the same for the reference.
        effect: difference of the scores, arm minus reference; its cases are the measure's units.
        arm_score: mean over seeds and cases.
        reference_score: the same of the reference.
        seed_spread: standard deviation of the reference's mean score over seeds; NaN with one seed.
        p_holm: the Wilcoxon p-value, corrected for all findings of the comparison.
        speed: unit -> budget at which the arm first reached the reference's final score on the tuning
            cases, as a fraction of the reference's whole budget; median over runs; infinity: never.
        measure: what is scored.
        over: training-set sizes that are averaged; empty: that of `point` alone.
    """

    point: Point
    reference: Point
    effect: Effect
    arm_score: float
    reference_score: float
    seed_spread: float
    p_holm: float
    speed: Mapping[str, float]
    measure: Measure = MEASURES["segmentation"]
    over: tuple[int, ...] = ()

    @property
    def size(self) -> int | str:
        """Number of labelled training cases; in words for several sizes."""
        if self.over:
            return f"mean of {', '.join(str(number or 'all') for number in self.over)}"
        return self.point.size or "all"

    def row(self) -> dict[str, Any]:
        """A row of `effects.csv`, or of `overall.csv`."""
        point = self.point
        return {
            "group": point.group,
            "arm": point.arm,
            "strategy": point.strategy,
            "labels": self.size,
            "budget": point.budget,
            "reference": self.reference.arm,
            self.measure.key: self.arm_score,
            f"reference_{self.measure.key}": self.reference_score,
            "effect": self.effect.mean,
            "low": self.effect.low,
            "high": self.effect.high,
            "verdict": self.effect.verdict,
            "p_wilcoxon": self.effect.p_value,
            "p_holm": self.p_holm,
            "seeds": self.effect.seeds,
            "cases": self.effect.cases,
            "seed_spread": self.seed_spread,
            "effect_by_seed_spread": self.effect.mean / self.seed_spread if self.seed_spread else math.nan,
            "detectable": self.effect.detectable,
            **{f"{unit}_to_reference": share for unit, share in self.speed.items()},
        }
