"""The cases for training, tuning and evaluation in one run of a comparison."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medi3d.datasets.clips.clips import Clip, read_clip_list
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.datasets.clips.splits import split_clips
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.formats import content_files
from medi3d.errors import ConfigError
from medi3d.experiment.samples import split_volumes
from medi3d.experiment.settings import ClassificationExperiment, SegmentationExperiment
from medi3d.files import write_table, written_aside

Item = Case | Clip
EVALUATION = "evaluation"
"""Name of the split that is scored; no training uses it."""

TUNING_DRAW, SUBSET_DRAW = 1, 2
"""Second words of the seeds, which make the draws independent."""


@dataclass(frozen=True)
class Parts:
    """Cases of one run; a subject's cases are never divided between training, tuning and evaluation."""

    training: tuple[Item, ...]
    tuning: tuple[Item, ...]
    evaluation: tuple[Item, ...]
    classes: tuple[str, ...] = ()
    """of clips"""

    @property
    def splits(self) -> dict[str, tuple[Item, ...]]:
        """Name of a split -> its cases."""
        return {"training": self.training, "validation": self.tuning, EVALUATION: self.evaluation}

    @property
    def suffix(self) -> str:
        """Suffix of the list of cases: .csv for clips, .json for volumes."""
        return ".csv" if self.classes else ".json"

    def files(self) -> list[Path]:
        """All files of all cases."""
        cases = [case for part in self.splits.values() for case in part]
        named = [
            (case.path,) if isinstance(case, Clip) else (*case.images, *case.label_files) for case in cases
        ]
        return [file for group in named for path in group for file in content_files(path)]

    def names(self) -> dict[str, list[str]]:
        """Split -> names of its cases, sorted."""
        return {split: sorted(case.name for case in cases) for split, cases in self.splits.items()}

    def subset(self, count: int, seed: int) -> "Parts":
        """With `count` of the training cases (0: all); for one seed, larger counts contain smaller ones.

        Raises:
            ConfigError: there are fewer.
        """
        if count > len(self.training):
            raise ConfigError(f"sizes has {count}: only {len(self.training)} cases are left for training")
        generator = np.random.default_rng([seed, SUBSET_DRAW])
        order = _drawn_in_turn([_class_of(case) for case in self.training], generator)
        return replace(self, training=tuple(self.training[index] for index in sorted(order[: count or None])))

    def write(self, path: Path) -> None:
        """Write the list of cases, with their splits, as `read_cohort` or `read_clip_list` reads it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.classes:
            write_table(
                path, [_clip_row(clip, self.classes, s) for s, clips in self.splits.items() for clip in clips]
            )
            return
        rows = [_row(case, split) for split, cases in self.splits.items() for case in cases]
        with written_aside(path) as aside:
            aside.write_text(json.dumps(rows, indent=1) + "\n")


def part_cases(
    experiment: SegmentationExperiment | ClassificationExperiment,
    tuning: int,
    folds: int = 1,
    fold: int | None = None,
) -> Parts:
    """Training, tuning and evaluation cases of an experiment's cohort or list of clips.

    Evaluation cases are those that its settings hold out, or one of `folds` folds. Tuning cases are drawn
    from the others by `split_seed`, whole subjects (scenes) at a time, with classes of clips balanced.

    Raises:
        ConfigError: no case is left for training or for evaluation.
        DataError: as `split_volumes` and `split_clips`.
    """
    settings = experiment.data if fold is None else replace(experiment.data, folds=folds, fold=fold)
    rest: Sequence[Item]
    evaluation: Sequence[Item]
    classes: tuple[str, ...] = ()
    if isinstance(settings, ClipSettings):
        listed = read_clip_list(settings)
        classes = listed.classes
        rest, evaluation = split_clips(listed.clips, settings)
    else:
        rest, evaluation = split_volumes(settings)
    if not evaluation:
        key = "validation_groups" if classes else "validation"
        raise ConfigError(f"data.{key}: no case is held out to score the runs; hold some out")
    held = _draw_subjects(rest, tuning, np.random.default_rng([settings.split_seed, TUNING_DRAW]))
    training = [case for case in rest if case.subject not in held]
    if not training:
        raise ConfigError(f"tuning_cases is {tuning}: no case is left for training, of {len(rest)}")
    chosen = [case for case in rest if case.subject in held]
    return Parts(tuple(training), tuple(chosen), tuple(evaluation), classes)


def _draw_subjects(
    cases: Sequence[Item], count: int, generator: np.random.Generator
) -> set[str | tuple[int, str]]:
    """Subjects drawn until `count` cases are reached; with clips, class by class in turn."""
    classes = {case.subject: _class_of(case) for case in cases}
    subjects: list[Any] = sorted(classes)
    chosen: set[str | tuple[int, str]] = set()
    for index in _drawn_in_turn([classes[subject] for subject in subjects], generator):
        if sum(case.subject in chosen for case in cases) >= count:
            break
        chosen.add(subjects[index])
    return chosen


def _drawn_in_turn(classes: Sequence[int], generator: np.random.Generator) -> list[int]:
    """All indices in random order, cycling through the classes; volumes have a single class."""
    order = generator.permutation(len(classes)).tolist()
    seen: Counter[int] = Counter()
    rounds = []
    for index in order:
        rounds.append(seen[classes[index]])
        seen[classes[index]] += 1
    return [index for _, index in sorted(zip(rounds, order, strict=True), key=lambda pair: pair[0])]


def _class_of(case: Item) -> int:
    return case.label if isinstance(case, Clip) else 0


def _clip_row(clip: Any, classes: Sequence[str], split: str) -> dict[str, object]:
    return {
        "path": str(clip.path.absolute()),
        "class": classes[clip.label],
        "label": clip.label,
        "group": clip.group,
        "split": split,
        "name": clip.name,
    }


def _absolute(masks: Iterable[tuple[str, Path]]) -> dict[str, str] | None:
    return {name: str(path.absolute()) for name, path in masks} or None


def _row(case: Any, split: str) -> dict[str, object]:
    return {
        "name": case.name,
        "image": [str(path.absolute()) for path in case.images],
        "label": str(case.label.absolute()) if case.label else _absolute(case.structures),
        "subject": case.subject,
        "split": split,
    }
