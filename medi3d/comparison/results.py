"""Results of a comparison: tables of runs, cases and effects."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from medi3d.comparison.cell import Result
from medi3d.comparison.findings import Finding
from medi3d.comparison.grid import Cell, Grid, Point, Rates
from medi3d.comparison.measures import MEASURES, Measure
from medi3d.comparison.wording import answer
from medi3d.evaluation.statistics import budget_to_reach, by_unit, holm, paired_effect
from medi3d.files import write_table

CURVE_UNITS = {"steps": "step", "cpu_seconds": "training_cpu_seconds"}
"""Name in `effects.csv` -> column of `metrics.csv`, for the speed of convergence."""


@dataclass(frozen=True)
class Results:
    """A grid whose runs are done.

    Attributes:
        grid: the grid.
        cells: point -> its run.
        done: point -> result of its run; failed runs are missing.
        rates: the learning rates that a search chose; empty where they are shared.
        failed: id of a run -> why.
    """

    grid: Grid
    cells: dict[Point, Cell]
    done: dict[Point, Result]
    rates: Rates
    failed: dict[str, str]

    def run_rows(self) -> list[dict[str, Any]]:
        """`results.csv`: a row for each point of the grid that is done."""
        return [{**_place(p), **result.facts, "run": self.cells[p].id} for p, result in self.done.items()]

    def case_rows(self) -> list[dict[str, Any]]:
        """`cases.csv`: a row for each case and label of each point."""
        return [{**_place(point), **row} for point, result in self.done.items() for row in result.cases]

    @cached_property
    def findings(self) -> list[Finding]:
        """All arms but the references, in config order, with corrected p-values."""
        return _corrected(self._finding([point]) for point in self._series())

    @cached_property
    def overall(self) -> list[Finding]:
        """The same averaged over training-set sizes, for arms with several; corrected separately.

        The score of a case is its mean over the sizes, so that seeds and cases are what is resampled.
        """
        series: dict[Point, list[Point]] = {}
        for point in self._series():
            series.setdefault(replace(point, size=0), []).append(point)
        return _corrected(self._finding(points) for points in series.values() if len(points) > 1)

    @property
    def answer(self) -> str:
        """The whole comparison in a sentence, averaged over training-set sizes."""
        told = {replace(finding.point, size=0) for finding in self.overall}
        single = [finding for finding in self.findings if replace(finding.point, size=0) not in told]
        return answer([*self.overall, *single])

    def complete_seeds(self, point: Point) -> list[int]:
        """Seeds whose folds are all done at `point`."""
        comparison = self.grid.comparison
        return [
            seed
            for seed in comparison.seeds
            if all(replace(point, seed=seed, fold=fold) in self.done for fold in range(comparison.folds))
        ]

    @property
    def measure(self) -> Measure:
        """What is scored."""
        return MEASURES[self.grid.base.task]

    def score_table(self, point: Point, seeds: list[int]) -> tuple[np.ndarray, list[str]]:
        """Scores `(seeds, cases)` averaged over labels, and the names of the cases, over all folds."""
        tables = []
        for seed in seeds:
            table: dict[str, float] = {}
            for fold in range(self.grid.comparison.folds):
                table |= self.done[replace(point, seed=seed, fold=fold)].scores(self.measure.key)
            tables.append(table)
        names = sorted(tables[0])
        return np.array([[table[name] for name in names] for table in tables]), names

    def _series(self) -> Iterator[Point]:
        """A point for each (group, arm, strategy, size, budget) except references."""
        seen = {replace(point, seed=0, fold=0): None for point in self.cells}
        for point in sorted(seen, key=lambda point: self._order(point)):
            if self.grid.reference_of(point) != point:
                yield point

    def _order(self, point: Point) -> tuple[int, ...]:
        comparison = self.grid.comparison
        group = comparison.groups[point.group]
        return (
            list(comparison.groups).index(point.group),
            list(comparison.budgets).index(point.budget),
            list(group.arms).index(point.arm),
            ["original", "fixed", "full"].index(point.strategy),
            point.size or 10**9,
        )

    def _finding(self, points: Sequence[Point]) -> Finding | None:
        """An arm at one size, or averaged over several; None: no seed is done for all of them."""
        references = [self.grid.reference_of(point) for point in points]
        complete = [set(self.complete_seeds(point)) for point in (*points, *references)]
        seeds = [seed for seed in self.grid.comparison.seeds if all(seed in done for done in complete)]
        if not seeds:
            return None
        (arm, names), (other, _) = self._mean_table(points, seeds), self._mean_table(references, seeds)
        units = [self.grid.subjects[name] for name in names]
        return Finding(
            point=points[0],
            reference=references[0],
            effect=paired_effect(by_unit(arm - other, units), most=1.0),
            arm_score=float(arm.mean()),
            reference_score=float(other.mean()),
            seed_spread=float(other.mean(axis=1).std(ddof=1)) if len(seeds) > 1 else math.nan,
            p_holm=math.nan,
            speed={
                unit: self._speed(list(zip(points, references, strict=True)), seeds, column)
                for unit, column in CURVE_UNITS.items()
            },
            measure=self.measure,
            over=tuple(point.size for point in points) if len(points) > 1 else (),
        )

    def _mean_table(self, points: Sequence[Point], seeds: list[int]) -> tuple[np.ndarray, list[str]]:
        tables = [self.score_table(point, seeds) for point in points]
        return np.mean([scores for scores, _ in tables], axis=0), tables[0][1]

    def _speed(self, pairs: Sequence[tuple[Point, Point]], seeds: list[int], column: str) -> float:
        shares, score, folds = [], self.measure.key, range(self.grid.comparison.folds)
        for (point, reference), seed, fold in product(pairs, seeds, folds):
            goal = self.done[replace(reference, seed=seed, fold=fold)].curve[-1]
            curve = self.done[replace(point, seed=seed, fold=fold)].curve
            shares.append(budget_to_reach(curve, goal[score], column, score) / goal[column])
        return float(np.median(shares))


def _corrected(found: Iterable[Finding | None]) -> list[Finding]:
    """Findings, with p-values corrected for their number."""
    kept = [finding for finding in found if finding is not None]
    corrected = holm([finding.effect.p_value for finding in kept])
    return [replace(finding, p_holm=p) for finding, p in zip(kept, corrected, strict=True)]


def write_results(results: Results, folder: Path) -> None:
    """Write `results.csv`, `cases.csv`, `effects.csv` and `overall.csv`; an empty table is left out."""
    tables = {
        "results.csv": results.run_rows(),
        "cases.csv": results.case_rows(),
        "effects.csv": [finding.row() for finding in results.findings],
        "overall.csv": [finding.row() for finding in results.overall],
    }
    for name, rows in tables.items():
        if rows:
            write_table(folder / name, rows)


def _place(point: Point) -> dict[str, Any]:
    row = asdict(point)
    return {"labels" if key == "size" else key: value for key, value in row.items()} | {
        "labels": point.size or "all"
    }
