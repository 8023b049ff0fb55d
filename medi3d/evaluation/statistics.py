"""Paired difference between an arm and its reference over cases and seeds, with its uncertainty."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8
DRAWS = 4000
ROUNDING = 1e-12


@dataclass(frozen=True)
class Effect:
    """A mean paired difference, arm minus reference.

    Attributes:
        mean: over all seeds and cases.
        low: lower end of the interval.
        high: upper end of the interval.
        p_value: Wilcoxon signed-rank test over the cases, each averaged over its seeds. It generalises
            these trained networks to other cases; the interval generalises to other seeds too.
        seed_deviation: of the mean difference between seeds; NaN with one seed.
        detectable: smallest true difference with 80 % power at this spread.
        seeds: how many.
        cases: how many.
    """

    mean: float
    low: float
    high: float
    p_value: float
    seed_deviation: float
    detectable: float
    seeds: int
    cases: int

    @property
    def verdict(self) -> str:
        """Better or worse if the interval excludes zero, else "no difference seen"."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference seen"


def paired_effect(differences: np.ndarray, seed: int = 0, *, most: float = math.inf) -> Effect:
    """The effect in `differences` `(seeds, cases)`, arm minus reference on the same case and seed.

    The interval is a bootstrap over seeds and, independently, over cases (Owen, "The pigeonhole
    bootstrap", Ann. Appl. Stat. 1, 2007). With few seeds a bootstrap is too narrow: it divides by n, not
    n - 1, and knows nothing of Student's t (Hesterberg, Am. Stat. 69, 2015). So its quantiles are
    stretched about the mean until their width is that of the t interval with the variance of a two-way
    layout with random seeds and cases, and Satterthwaite's degrees of freedom; the shape stays its own.

    Args:
        differences: one number per seed and case, none missing.
        seed: of the bootstrap.
        most: no true difference is larger, of scores from 0 to 1 it is 1; the interval ends there.
    """
    error, freedom = _standard_error(differences)
    mean, (seeds, cases) = float(differences.mean()), differences.shape
    tail = (1 - LEVEL) / 2
    width = float(stats.t.ppf(1 - tail, freedom)) * error
    drawn = _bootstrap(differences, np.random.default_rng(seed))
    spread = float(stats.norm.ppf(1 - tail)) * float(drawn.std())
    if spread > ROUNDING:
        low, high = mean + (np.quantile(drawn, [tail, 1 - tail]) - mean) * (width / spread)
    else:  # nothing varies, or there is a single number
        low, high = mean - width, mean + width
    by_seed = differences.mean(axis=1)
    return Effect(
        mean=mean,
        low=max(float(low), -most),
        high=min(float(high), most),
        p_value=signed_rank(differences.mean(axis=0)),
        seed_deviation=float(by_seed.std(ddof=1)) if seeds > 1 else math.nan,
        detectable=width + float(stats.t.ppf(POWER, freedom)) * error,
        seeds=seeds,
        cases=cases,
    )


def mean_interval(
    values: Sequence[float],
    groups: Sequence[str],
    seed: int = 0,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float, float]:
    """Mean of `values`, one for each case, and its 95 % interval; cases of one group (subject) stay together.

    Percentiles of a bootstrap over groups, stretched about the mean by what a bootstrap of few is too
    narrow by: Student's t, and n - 1 (Hesterberg, Am. Stat. 69, 2015, "expanded percentile interval").
    With one group both ends are NaN. What is stretched beyond `bounds`, within which all values lie, is cut
    off: the mean cannot be there.
    """
    names = sorted(set(groups))
    place = [names.index(group) for group in groups]
    sums, counts = np.bincount(place, values), np.bincount(place)
    mean, n = float(sums.sum() / counts.sum()), len(names)
    if n == 1:
        return mean, math.nan, math.nan
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS)
    tail = (1 - LEVEL) / 2
    stretch = stats.t.ppf(1 - tail, n - 1) / stats.norm.ppf(1 - tail) * (n / (n - 1)) ** 0.5
    low, high = mean + (np.quantile(drawn @ sums / (drawn @ counts), [tail, 1 - tail]) - mean) * stretch
    return mean, max(float(low), bounds[0]), min(float(high), bounds[1])


def _standard_error(differences: np.ndarray) -> tuple[float, float]:
    """Standard error of the mean and its degrees of freedom, seeds and cases random and crossed.

    With one seed only cases are random; with one case only seeds are.
    """
    seeds, cases = differences.shape
    if min(seeds, cases) == 1:
        count = max(seeds, cases)
        return (float(differences.std(ddof=1)) / count**0.5, count - 1) if count > 1 else (math.inf, 1)
    grand, by_seed, by_case = differences.mean(), differences.mean(axis=1), differences.mean(axis=0)
    rest = differences - by_seed[:, None] - by_case[None] + grand
    free_seeds, free_cases = seeds - 1, cases - 1
    square_seeds = cases * float(((by_seed - grand) ** 2).sum()) / free_seeds
    square_cases = seeds * float(((by_case - grand) ** 2).sum()) / free_cases
    square_rest = float((rest**2).sum()) / (free_seeds * free_cases)
    total = square_seeds + square_cases - square_rest
    largest = max(square_seeds, square_cases)
    if total <= largest:  # the smaller component can fall below the noise by chance: leave it out
        free = free_seeds if square_seeds >= square_cases else free_cases
        return (largest / (seeds * cases)) ** 0.5, free
    terms = (square_seeds, free_seeds), (square_cases, free_cases), (square_rest, free_seeds * free_cases)
    freedom = total**2 / sum(square**2 / free for square, free in terms)
    return (total / (seeds * cases)) ** 0.5, freedom


def _bootstrap(differences: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of `differences` with seeds and cases resampled."""
    seeds, cases = differences.shape
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    by_case = generator.multinomial(cases, np.full(cases, 1 / cases), DRAWS) / cases
    return (by_seed @ differences * by_case).sum(axis=1)


def signed_rank(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 where nothing differs."""
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="zsplit").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scand. J. Stat. 6, 1979)."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def by_unit(differences: np.ndarray, units: Sequence[Hashable]) -> np.ndarray:
    """`(seeds, cases)` as `(seeds, units)`, with the same overall mean, so that whole units are resampled.

    A unit is weighted by its cases: the sum of theirs, times units per case (a cluster bootstrap of the
    mean). Where each case is its own unit nothing changes.
    """
    distinct = list(dict.fromkeys(units))
    sums = np.zeros((len(differences), len(distinct)))
    for column, unit in enumerate(units):
        sums[:, distinct.index(unit)] += differences[:, column]
    return sums * (len(distinct) / len(units))


def budget_to_reach(
    curve: Sequence[Mapping[str, Any]], target: float, unit: str, score: str = "dice"
) -> float:
    """Amount of `unit` (a column of `metrics.csv`) until a training reached a score; infinity: never.

    Interpolated linearly between validations.
    """
    before = None
    for row in curve:
        if math.isnan(row[score]):
            continue
        if row[score] >= target:
            if before is None:
                return row[unit]
            share = (target - before[score]) / (row[score] - before[score])
            return before[unit] + share * (row[unit] - before[unit])
        before = row
    return math.inf
