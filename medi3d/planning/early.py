"""What a config and a cohort's list determine before any image is read, and every fault in them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from medi3d.datasets.cohorts.cohort import Case, Cohort
from medi3d.datasets.cohorts.splits import VALIDATION, listed_folds, split_cases, without_tests
from medi3d.datasets.images.files import read_header
from medi3d.errors import ConfigError, DataError, Medi3dError
from medi3d.experiment.config import complete
from medi3d.experiment.tasks import build_network, build_task
from medi3d.planning.choices import Choice

PART, MOST = 5, 40
"""One case in `PART` is held out for validation, at most `MOST` cases."""


def plan_listed(cohort: Cohort, given: dict[str, Any]) -> tuple[list[Choice], list[str]]:
    """Choose labels, channels and split where they are not given, and list what is wrong with them.

    Raises:
        ConfigError: labels are neither given nor in the list.
    """
    labels = {name: value for name, value in cohort.labels.items() if value != 0}
    named = any(key.startswith("data.labels") for key in given)
    if not labels and not named:
        raise ConfigError("data.labels: neither given nor in the cohort's list; add {name: value, ...}")
    choices = [] if named else [Choice("data.labels", labels, "named by the cohort")]
    cases = without_tests(cohort.cases)
    channels, problems = _channels(cohort, cases, given)
    split, more = _split(cases, given)
    return [*choices, *channels, *split], [*problems, *more]


def _channels(cohort: Cohort, cases: Sequence[Case], given: dict[str, Any]) -> tuple[list[Choice], list[str]]:
    choices, problems = [], []
    if "data.channels" in given:
        count, why = int(given["data.channels"]), "as many as data.channels"
    elif cohort.channels:
        count, why = len(cohort.channels), ", ".join(cohort.channels)
    else:
        count, why = _counted(cases)
    if "data.channels" not in given:
        choices.append(Choice("data.channels", count, why))
    if "network.in_channels" not in given:
        choices.append(Choice("network.in_channels", count, f"the cohort's channels: {why}"))
    elif int(given["network.in_channels"]) != count:
        problems.append(
            f"network.in_channels is {given['network.in_channels']} where a case has {count} channels ({why})"
        )
    files = Counter(len(case.images) for case in cases)
    usual = files.most_common(1)[0][0] if files else 1
    problems += [
        f"case {case.name}: {len(case.images)} image files where other cases have {usual}"
        for case in cases
        if len(case.images) != usual
    ]
    return choices, problems


def _counted(cases: Sequence[Case]) -> tuple[int, str]:
    """The number of channels per case, from the list or the first readable header; and the reason."""
    usual = Counter(len(case.images) for case in cases).most_common(1)
    if usual and usual[0][0] > 1:
        return usual[0][0], "image files of a case"
    for case in cases:
        try:
            count = read_header(case.images[0]).channels
        except Medi3dError:  # reported when the cases are examined
            continue
        return count, f"3D images in {case.images[0].name}"
    return 1, "one image file a case"


def _split(cases: Sequence[Case], given: dict[str, Any]) -> tuple[list[Choice], list[str]]:
    """Choose the validation cases if neither the config nor the list does."""
    problems = [
        f"case {case.name} has no label; training needs one for each: give it one, or the split test"
        for case in cases
        if not case.label_files
    ]
    if any(key in given for key in ("data.validation", "data.folds", "data.fold")):
        return [], problems
    try:
        folds = listed_folds(cases)
    except DataError as error:
        return [], [*problems, str(error)]
    if folds:
        why = f"the list names {folds} folds; data.fold=all trains each in turn"
        return [
            Choice("data.folds", folds, why),
            Choice("data.fold", 0, "the first of them validates"),
        ], problems
    if any(case.split in VALIDATION for case in cases):
        return [], problems
    subjects = len({case.subject for case in cases})
    if subjects < 2:
        return [], problems
    held = min(MOST, max(1, round(subjects / PART)))
    why = f"one of {PART} of {len(cases)} cases, {MOST} at most"
    if subjects < 2 * PART:
        why = f"of {len(cases)} cases only; data.folds={min(PART, subjects)} data.fold=all scores each once"
    return [Choice("data.validation", held, why)], problems


def early_problems(given: DictConfig, cohort: Cohort) -> list[str]:
    """Faults of the config, the network or the split that can be found without reading an image."""
    trial: Any = OmegaConf.create(OmegaConf.to_container(given))
    if "modality" not in trial.data and "by_channel" not in trial.data:
        how = trial.data.get("normalisation") or {}
        trial.data.modality = "CT" if how.get("method") == "window" else "MR"
    elif "by_channel" in trial.data and "modality" not in trial.data:
        trial.data.modality = trial.data.by_channel[0].get("modality", "other")
    if trial.data.get("modality") == "CT" and not trial.data.get("normalisation"):
        trial.data.normalisation = {"method": "window", "window": [0.0, 1.0]}
    problems = []
    try:
        experiment: Any = complete(trial)
    except Medi3dError as error:
        return [str(error)]
    try:
        build_network(experiment, build_task(experiment), pretrained=False, proof=False)
    except Medi3dError as error:
        problems.append(str(error))
    cases = without_tests(cohort.cases)
    alone = len({case.subject for case in cases}) < 2 and "validation" not in given.data
    if not alone and experiment.data.fold != "all":
        try:
            split_cases(cohort.cases, experiment.data)
        except Medi3dError as error:
            problems.append(str(error))
    return problems


def flat(given: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, for sections and for the keys below them."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        path = prefix + str(key)
        values[path] = value
        if isinstance(value, DictConfig):
            values |= flat(value, path + ".")
    return values


def add(given: DictConfig, choices: Sequence[Choice]) -> None:
    """Write choices into a config."""
    for choice in choices:
        OmegaConf.update(given, choice.key, choice.value, merge=False, force_add=True)
