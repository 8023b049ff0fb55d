"""Split cases into training and validation, keeping subjects whole."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.settings import ALL_FOLDS, VolumeSettings
from medi3d.errors import ConfigError, DataError

TRAINING, VALIDATION = ("training", "train"), ("validation", "val", "valid")


def split_cohort(cases: Sequence[Case], validation: int, seed: int = 0) -> tuple[list[Case], list[Case]]:
    """Split the cases into training and validation, each sorted by name.

    If the list names validation cases, they are used (cases of other splits are left out). Otherwise
    subjects are drawn until `validation` cases are reached; the draw depends on the seed but not on the
    order of the list.

    Args:
        cases: All of them.
        validation: Number of cases to hold out; reached exactly if each subject has one case. 0: none;
            the training cases then serve as both.
        seed: Of the draw.

    Raises:
        DataError: Some cases name a split and some do not, one subject is in both parts, or no
            case is left for training.
    """
    ordered = sorted(cases, key=lambda case: case.name)
    named = [case for case in ordered if case.split in (*TRAINING, *VALIDATION)]
    bare = [case for case in ordered if case.split is None]
    if named and bare:
        raise DataError(
            f"case {bare[0].name} names no split but others do; give a split to all cases or to none"
        )
    if any(case.split in VALIDATION for case in named):
        training = [case for case in ordered if case.split in TRAINING]
        held = [case for case in ordered if case.split in VALIDATION]
        both = {case.subject for case in training} & {case.subject for case in held}
        if both:
            raise DataError(f"subject {min(both)} is in training and in validation; a subject belongs to one")
    elif not validation:
        training = held = named or bare
    else:
        bare = named or bare
        subjects = sorted({case.subject for case in bare})
        count = Counter(case.subject for case in bare)
        chosen: set[str] = set()
        reached = 0
        for index in np.random.default_rng(seed).permutation(len(subjects)):
            if reached >= validation:
                break
            chosen.add(subjects[index])
            reached += count[subjects[index]]
        training = [case for case in bare if case.subject not in chosen]
        held = [case for case in bare if case.subject in chosen]
    if not training:
        raise DataError(
            f"no case is left for training: {len(ordered)} cases, {len(held)} of them for validation "
            f"(data.validation: {validation}); {_remedy(named or bare)}"
        )
    return training, held


def _remedy(cases: Sequence[Case]) -> str:
    subjects = len({case.subject for case in cases})
    if subjects > 1:
        return f"hold fewer back with data.validation={max(1, subjects // 5)}, or name some as training"
    return "give more cases of other subjects, or overfit on purpose with data.validation=0"


def listed_folds(cases: Sequence[Case]) -> int:
    """The number of folds that the list names, numbered from 0; 0 if it names none.

    Raises:
        DataError: Some cases have a fold and some do not, a fold is empty, or a subject is in two.
    """
    taken = without_tests(cases)
    folds = {case.fold for case in taken if case.fold is not None}
    if not folds:
        return 0
    bare = [case.name for case in taken if case.fold is None]
    if bare:
        raise DataError(f"case {bare[0]} names no fold but others do; give a fold to all cases or to none")
    if folds != set(range(len(folds))) or len(folds) < 2:
        raise DataError(f"the list names the folds {sorted(folds)}; expected two or more, counted from 0")
    fold_of: dict[str, int | None] = {}
    for case in taken:
        if fold_of.setdefault(case.subject, case.fold) != case.fold:
            raise DataError(f"subject {case.subject} is in two folds of the list; a subject belongs to one")
    return len(folds)


def without_tests(cases: Sequence[Case]) -> list[Case]:
    """The cases whose split is training, validation or not given."""
    return [case for case in cases if case.split in (None, *TRAINING, *VALIDATION)]


def split_cases(cases: Sequence[Case], settings: VolumeSettings) -> tuple[list[Case], list[Case]]:
    """Split training and validation cases as configured: one fold of several, or `split_cohort`.

    Folds are nnU-Net's (Isensee et al. 2021): sorted names, shuffled with seed 12345, cut into equal
    parts; here of subjects, so that no subject is in two folds. If the list names a fold for each
    case, it is used. The list's training and validation cases are pooled; others (a test set) are left
    out.

    Raises:
        ConfigError: all folds are asked for, but a split has one.
        DataError: as `split_cohort` and `listed_folds`; there are fewer subjects than folds, or the list
            names another number of them.
    """
    if not settings.folds:
        return split_cohort(cases, settings.validation, settings.split_seed)
    if not isinstance(settings.fold, int):
        raise ConfigError(f"data.fold is {ALL_FOLDS}: one fold is needed here, 0 to {settings.folds - 1}")
    taken = without_tests(cases)
    ordered = sorted(taken, key=lambda case: case.name)
    if listed := listed_folds(cases):
        if listed != settings.folds:
            raise DataError(
                f"the list names {listed} folds where data.folds is {settings.folds}; use data.folds={listed}"
            )
        return (
            [case for case in ordered if case.fold != settings.fold],
            [case for case in ordered if case.fold == settings.fold],
        )
    subjects = sorted({case.subject for case in taken})
    if len(subjects) < settings.folds:
        raise DataError(
            f"{len(subjects)} subjects cannot make {settings.folds} folds; ask for fewer (data.folds)"
        )
    np.random.RandomState(12345).shuffle(subjects)
    held = set(np.array_split(subjects, settings.folds)[settings.fold])
    return [c for c in ordered if c.subject not in held], [c for c in ordered if c.subject in held]
