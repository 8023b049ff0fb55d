"""The grid of a comparison: every point, and the run that computes it."""

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from medi3d.comparison.settings import Comparison, GroupSettings
from medi3d.comparison.subsets import EVALUATION, Parts, part_cases
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.errors import ConfigError
from medi3d.experiment.run import Run
from medi3d.experiment.settings import ClassificationExperiment, Experiment, SegmentationExperiment
from medi3d.files import file_sha256
from medi3d.keys import stable_dict

Resolve = Callable[[Sequence[Mapping[str, Any]]], Experiment]
"""Parts of a config, laid over the base one after another -> the experiment."""

Scored = SegmentationExperiment | ClassificationExperiment
"""Experiments whose runs are scored case by case."""

GENERATION = 1
"""Increased when a code change makes old runs incomparable with new ones."""


@dataclass(frozen=True)
class Cell:
    """One run. Points that need the same run share it.

    Attributes:
        id: name of its folder.
        digest: SHA-256 of everything that determines its result.
        experiment: what is trained; `data.root` is a list of its cases.
        parts: these cases.
        split: the split on which it is scored.
        threads: of its process.
        contents: SHA-256 of its images, labels and plan file, which may change under the same names.
    """

    id: str
    digest: str
    experiment: Scored
    parts: Parts
    split: str
    threads: int
    contents: str = ""

    def run(self, cells: Path) -> Run:
        """Its run folder in the folder of all cells."""
        return Run(cells / self.id, self.experiment)


@dataclass(frozen=True)
class Point:
    """One place in the grid."""

    group: str
    arm: str
    strategy: str
    size: int
    seed: int
    fold: int
    budget: str

    @property
    def series(self) -> tuple[str, str, str]:
        """Group, arm and strategy, which share a learning rate."""
        return self.group, self.arm, self.strategy


Rates = Mapping[tuple[str, str, str], float]
"""`Point.series` -> learning rate."""


class Grid:
    """All runs of a comparison.

    Args:
        comparison: what to compare.
        resolve: see `Resolve`.
        folder: of the comparison; each run has a folder in `cells`, and its list of cases in `cohorts`.

    Raises:
        ConfigError: the base cannot be compared, or an arm's changes are not a valid config.
        DataError: the cohort cannot be read.
    """

    def __init__(self, comparison: Comparison, resolve: Resolve, folder: Path):
        self.comparison, self.resolve, self.folder = comparison, resolve, folder
        base = resolve([comparison.changes])
        base = _scored(base)
        folds = range(comparison.folds) if comparison.folds > 1 else [None]
        self._folds = [part_cases(base, comparison.tuning_cases, comparison.folds, fold) for fold in folds]
        self.base = base

    @property
    def subjects(self) -> dict[str, Hashable]:
        """Evaluation case -> its subject, or its scene."""
        return {case.name: case.subject for parts in self._folds for case in parts.evaluation}

    def cells(self, rates: Rates) -> dict[Point, Cell]:
        """Point -> its run, with the learning rates that a search found."""
        points = [point for name in self.comparison.groups for point in self._points(name)]
        # Seed by seed, so that an unfinished grid has complete seeds.
        by_seed = sorted(points, key=lambda point: (point.seed, point.fold))
        cells = {point: self._cell(point, rates.get(point.series)) for point in by_seed}
        first = {cell.digest: cell for cell in reversed(cells.values())}
        return {point: first[cell.digest] for point, cell in cells.items()}

    def search_cells(self) -> dict[tuple[Point, float], Cell]:
        """(Point, learning rate) -> run of the search: first seed, first fold, scored on the tuning cases."""
        search, comparison = self.comparison.search, self.comparison
        if not search.rates:
            return {}
        budget = search.budget or next(iter(comparison.budgets))
        most = max(comparison.sizes, key=lambda count: count or math.inf)
        size = most if search.size is None else search.size
        seed = comparison.seeds[0]
        series = dict.fromkeys(point.series for name in comparison.groups for point in self._points(name))
        return {
            (point, rate): self._cell(point, rate, split="validation")
            for point, rate in product(
                (Point(*names, size, seed, 0, budget) for names in series), search.rates
            )
        }

    def reference_of(self, point: Point) -> Point:
        """The point that `point` is compared with: of the same strategy where the reference arm has it.

        Raises:
            ConfigError: the reference arm has several strategies and not this one.
        """
        group = self.comparison.groups[point.group]
        strategies = self._strategies(group, group.reference)
        if point.strategy not in strategies and len(strategies) > 1:
            raise ConfigError(
                f"groups.{point.group}: the reference {group.reference} has no strategy {point.strategy}, "
                f"but {' and '.join(strategies)}; give it one strategy"
            )
        strategy = point.strategy if point.strategy in strategies else strategies[0]
        return replace(point, arm=group.reference, strategy=strategy)

    def _points(self, name: str) -> Iterator[Point]:
        comparison, group = self.comparison, self.comparison.groups[name]
        budgets = group.budgets or list(comparison.budgets)
        folds = range(comparison.folds)
        for arm in group.arms:
            places = product(self._strategies(group, arm), group.sizes or comparison.sizes)
            for (strategy, size), seed, fold, budget in product(places, comparison.seeds, folds, budgets):
                yield Point(name, arm, strategy, size, seed, fold, budget)

    def _strategies(self, group: GroupSettings, arm: str) -> Sequence[str]:
        own = (group.arms[arm] or {}).get("strategy")
        return [own] if own else group.strategies or self.comparison.strategies

    def _cell(self, point: Point, rate: float | None, split: str = EVALUATION) -> Cell:
        comparison, group = self.comparison, self.comparison.groups[point.group]
        arm = dict(group.arms[point.arm] or {})
        seed = point.seed + arm.pop("seed_shift", 0)
        parts = self._folds[point.fold].subset(point.size, point.seed)
        changes = [comparison.changes, group.changes, {"training": comparison.budgets[point.budget]}, arm]
        if rate is not None:
            changes.append({"training": {"learning_rate": rate}})
        changes.append({"strategy": point.strategy, "seed": seed})
        try:
            experiment = self.resolve(changes)
        except ConfigError as error:
            raise ConfigError(f"groups.{point.group}.arms.{point.arm}: {error}") from error
        experiment = _scored(experiment)
        digest = _digest(experiment, parts, split, comparison.threads)
        fold = f"-f{point.fold}" if comparison.folds > 1 else ""
        place = f"n{point.size or 'all'}-s{point.seed}{fold}-{point.budget}"
        name = f"{point.group}-{point.arm}-{point.strategy}-{place}-{digest[:8]}"
        listing = self.folder.absolute() / "cohorts" / f"{name}{parts.suffix}"
        data: Any = replace(experiment.data, root=str(listing), folds=0, fold=0)
        if isinstance(data, ClipSettings):
            data = replace(data, videos="", skip_damaged=False)
        named = replace(experiment, name=name, data=data)
        return Cell(name, digest, named, parts, split, comparison.threads, _contents(experiment, parts))


def _scored(experiment: Experiment) -> Scored:
    if not isinstance(experiment, Scored):
        raise ConfigError(f"base: task is {experiment.task}; segmentation and classification are compared")
    return experiment


def _digest(experiment: Scored, parts: Parts, split: str, threads: int) -> str:
    content = {
        "generation": GENERATION,
        "experiment": stable_dict(experiment) | {"name": None},
        "cases": parts.names(),
        "split": split,
        "threads": threads,
        "files": {name: file_sha256(Path(name)) for name in _files(experiment)},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _contents(experiment: Scored, parts: Parts) -> str:
    plan = Path(str(experiment.network.plan))
    files = [*parts.files(), *([plan] if plan.is_file() else [])]
    stamped = [(path, status.st_size, status.st_mtime_ns) for path in files if (status := path.stat())]
    return hashlib.sha256("".join(_sum_of(*stamp) for stamp in stamped).encode()).hexdigest()


@cache
def _sum_of(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file; read once, since the runs of a grid share their cases."""
    return file_sha256(path)


def _files(experiment: Experiment) -> list[str]:
    """The user's own weights and artifacts, whose content may change under the same name."""
    network = experiment.network
    named = (network.source, (network.weights or "").removeprefix("file:"))
    return [name for name in named if Path(name).is_file()]
