"""Which cases train, tune and judge in one run of a comparison."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medi3d.datasets.cohort import Case, split_cases
from medi3d.datasets.volumes import VolumeSettings
from medi3d.engine.files import written_aside
from medi3d.errors import ConfigError

EVALUATION = "evaluation"
"""Name of the split that judges; no training looks at it."""

TUNING_DRAW, SUBSET_DRAW = 1, 2
"""Second words of the seeds, so that the draws do not depend on one another."""


@dataclass(frozen=True)
class Parts:
    """Cases of one run; those of one subject never part between training, tuning and evaluation."""

    training: tuple[Case, ...]
    tuning: tuple[Case, ...]
    evaluation: tuple[Case, ...]

    def names(self) -> dict[str, list[str]]:
        """Split -> names of its cases, sorted."""
        splits = {"training": self.training, "validation": self.tuning, EVALUATION: self.evaluation}
        return {split: sorted(case.name for case in cases) for split, cases in splits.items()}

    def subset(self, count: int, seed: int) -> "Parts":
        """With `count` of the training cases (0: all); a larger count of one seed has those of a smaller.

        Raises:
            ConfigError: there are fewer.
        """
        if count > len(self.training):
            raise ConfigError(f"labels has {count}: only {len(self.training)} cases are left for training")
        order = np.random.default_rng([seed, SUBSET_DRAW]).permutation(len(self.training))
        chosen = sorted(order[: count or None])
        return Parts(tuple(self.training[index] for index in chosen), self.tuning, self.evaluation)

    def write(self, path: Path) -> None:
        """Write the list of cases, with their splits, as `read_cohort` reads it."""
        splits = {"training": self.training, "validation": self.tuning, EVALUATION: self.evaluation}
        rows = [_row(case, split) for split, cases in splits.items() for case in cases]
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_text(json.dumps(rows, indent=1) + "\n")


def part_cohort(cases: Sequence[Case], settings: VolumeSettings, tuning: int) -> Parts:
    """All training cases, tuning cases and judging cases of a cohort.

    Those judge that `split_cases` holds back; the tuning cases are drawn from the others by `split_seed`.

    Raises:
        ConfigError: a case has no label, or no case is left to train on or to judge with.
        DataError: as `split_cases`.
    """
    rest, judging = split_cases(cases, settings)
    for case in (*rest, *judging):
        if not case.label_files:
            raise ConfigError(f"{settings.root}: case {case.name} has no label; comparing needs one for each")
    if not judging:
        raise ConfigError("data.validation: no case is held back to judge the runs; hold some back")
    generator = np.random.default_rng([settings.split_seed, TUNING_DRAW])
    held = _draw_subjects(rest, tuning, generator)
    training = [case for case in rest if case.subject not in held]
    if not training:
        raise ConfigError(f"tuning is {tuning}: no case is left for training, of {len(rest)}")
    return Parts(tuple(training), tuple(c for c in rest if c.subject in held), tuple(judging))


def _draw_subjects(cases: Sequence[Case], count: int, generator: np.random.Generator) -> set[str]:
    """Subjects drawn until `count` cases are reached."""
    subjects = sorted({case.subject for case in cases})
    chosen: set[str] = set()
    for index in generator.permutation(len(subjects)):
        if sum(case.subject in chosen for case in cases) >= count:
            break
        chosen.add(subjects[index])
    return chosen


def _absolute(masks: Iterable[tuple[str, Path]]) -> dict[str, str] | None:
    return {name: str(path.absolute()) for name, path in masks} or None


def _row(case: Case, split: str) -> dict[str, object]:
    return {
        "name": case.name,
        "image": [str(path.absolute()) for path in case.images],
        "label": str(case.label.absolute()) if case.label else _absolute(case.structures),
        "subject": case.subject,
        "split": split,
    }
