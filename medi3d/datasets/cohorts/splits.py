"""Cases split into training and validation, whole subjects at a time."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.settings import ALL_FOLDS, VolumeSettings
from medi3d.errors import ConfigError, DataError

TRAINING, VALIDATION = ("training", "train"), ("validation", "val", "valid")


def split_cohort(cases: Sequence[Case], validation: int, seed: int = 0) -> tuple[list[Case], list[Case]]:
    """Part the cases into training and validation, each sorted by name.

    Where the list names splits they hold (cases of other splits are left out). Otherwise subjects
    are drawn until `validation` cases are reached, the same ones for the same seed whatever the
    order of the list.

    Args:
        cases: All of them.
        validation: Number of cases to hold back; reached exactly if each subject has one case.
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
    if named:
        training = [case for case in ordered if case.split in TRAINING]
        held = [case for case in ordered if case.split in VALIDATION]
        both = {case.subject for case in training} & {case.subject for case in held}
        if both:
            raise DataError(f"subject {min(both)} is in training and in validation; a subject belongs to one")
    else:
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
            f"(validation: {validation}); hold fewer back, or name some as training"
        )
    return training, held


def without_tests(cases: Sequence[Case]) -> list[Case]:
    """The cases that are for training or validation, or for which nothing is said."""
    return [case for case in cases if case.split in (None, *TRAINING, *VALIDATION)]


def split_cases(cases: Sequence[Case], settings: VolumeSettings) -> tuple[list[Case], list[Case]]:
    """Training and validation cases as the settings say: one fold of several, or `split_cohort`.

    Folds are nnU-Net's (Isensee et al. 2021): names in order, shuffled with seed 12345, cut into equal
    parts; here of subjects, so that no subject is in two. Of cases that name a split, those for
    training and validation are put together; others (a test set) are left out.

    Raises:
        ConfigError: all folds are asked for, which no split of one training is.
        DataError: as `split_cohort` says; or there are fewer subjects than folds.
    """
    if not settings.folds:
        return split_cohort(cases, settings.validation, settings.split_seed)
    if not isinstance(settings.fold, int):
        raise ConfigError(f"data.fold is {ALL_FOLDS}: one fold is needed here, 0 to {settings.folds - 1}")
    taken = without_tests(cases)
    subjects = sorted({case.subject for case in taken})
    if len(subjects) < settings.folds:
        raise DataError(f"{len(subjects)} subjects cannot make {settings.folds} folds; ask for fewer")
    np.random.RandomState(12345).shuffle(subjects)
    held = set(np.array_split(subjects, settings.folds)[settings.fold])
    ordered = sorted(taken, key=lambda case: case.name)
    return [c for c in ordered if c.subject not in held], [c for c in ordered if c.subject in held]
