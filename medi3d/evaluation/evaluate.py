"""Scores of a run's best network, case by case, on the grids of the scans."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import SimpleITK as sitk
import torch
from rich.progress import track

from medi3d.datasets.clips.clips import Clip, load_clip, read_clip_list
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.datasets.clips.splits import split_clips
from medi3d.datasets.cohorts.cases import load_case, load_label
from medi3d.datasets.cohorts.cohort import Case, read_cohort
from medi3d.datasets.cohorts.splits import split_cases
from medi3d.datasets.images.geometry import spacing_dhw
from medi3d.datasets.images.preprocessing import load_image, to_array
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.engine.log import log, screen
from medi3d.engine.metrics import Row, dice_scores, mean_of_present, surface_scores, top_k
from medi3d.engine.precision import evaluating
from medi3d.errors import ConfigError, DataError, WeightsError
from medi3d.experiment.run import Run
from medi3d.experiment.settings import clips_of
from medi3d.experiment.tasks import build_network, build_task
from medi3d.files import write_table
from medi3d.prediction.postprocessing import decide, keep_largest, write_largest
from medi3d.prediction.predictor import Predictor, load_members, segment
from medi3d.reports.filters import first_kernel, plot_filters_over_time
from medi3d.reports.plots import expendable, plot_confusion, plot_overlay
from medi3d.reports.run_report import write_report

T = TypeVar("T")
METRICS = ("dice", "hd95", "surface_dice", "top1", "top5")
"""Columns of `cases.csv` that are averaged."""


def run_evaluation(run: Run, split: str = "validation") -> list[Row]:
    """Predict and score the cases of a split with the best network of a run.

    Writes `cases.csv` (for another split `cases_SPLIT.csv`), pictures and `report.html` into the run folder.
    The validation also decides which labels keep only their largest component from then on.

    Args:
        run: one training; or a cross-validation, whose folds are averaged.
        split: "training", "validation", or a name in the cohort's own list.

    Returns:
        Segmentation: a row per case and label with dice, hd95 (mm), surface_dice, dice_largest (with the
        largest component alone), volumes in ml, seconds.
        Classification: a row per clip with its label, the predicted one, its probability, top1 and top5.

    Raises:
        ConfigError: the run's task has no cases to score.
        DataError: no case is in the split, or one is damaged.
        WeightsError: the run has no usable checkpoint.
    """
    score = SCORERS.get(run.experiment.task)
    if score is None:
        raise ConfigError(f"task is {run.experiment.task!r}: one of {', '.join(SCORERS)} can be evaluated")
    if Path(split).name != split:
        raise ConfigError(f"split is {split!r}: it names a table, so it cannot hold a path")
    rows = score(run, split)
    write_table(run.cases(split), rows)
    means = summary(rows)
    table = [{"label": label, "n": count(rows, label), **numbers} for label, numbers in means.items()]
    report = write_report(run, {f"Mean over the {split} cases": table, "Cases": rows})
    scores = ", ".join(f"{name} {value:.4f}" for name, value in means["mean"].items())
    log.info(f"{split}: {scores} (n {count(rows)})")
    log.info(f"report: {report}")
    return rows


def _score_volumes(run: Run, split: str) -> list[Row]:
    predictors = load_members(run)
    if split == "validation":  # the validation decides about post-processing, so it is scored without
        predictors = [replace(one, largest=()) for one in predictors]
    cases = cases_of(predictors[0].volumes, split)  # of one fold, where the run has all
    rows = [row for case in _watched(cases) for row in score_case(predictors, case)]
    if len(predictors) == 1:  # an ensemble has no label map on the network's grid
        _draw_overlays(predictors[0], cases, rows, run.plots)
    if split == "validation":
        write_largest(run.largest, decide(rows))
    return rows


@evaluating()
def _score_clips(run: Run, split: str) -> list[Row]:
    predictor, settings = Predictor.load(run), clips_of(run.experiment)
    listed = read_clip_list(settings)
    training, validation = split_clips(listed.clips, settings)
    clips = {"training": training, "validation": validation}.get(split)
    if clips is None:
        clips = [clip for clip in listed.clips if clip.split == split]
    if not clips:
        raise DataError(f"{settings.root}: no clip in split {split!r}; try training or validation")
    rows = [_score_clip(predictor, settings, clip, listed.classes) for clip in _watched(clips)]
    pairs = [(row["label"], row["predicted"]) for row in rows]
    plot_confusion(pairs, listed.classes, run.plots / "confusion.png")
    _draw_filters(run, predictor)
    return rows


SCORERS: dict[str, Callable[[Run, str], list[Row]]] = {
    "segmentation": _score_volumes,
    "classification": _score_clips,
}
"""Word under `task` in a config -> what scores the cases of a split."""


@expendable
def _draw_filters(run: Run, predictor: Predictor) -> None:
    try:
        before = build_network(run.experiment, build_task(run.experiment))
    except WeightsError as error:  # the run may come from a machine that had the weights
        log.info(f"no picture of the filters: {error}")
        return
    plot_filters_over_time(first_kernel(before), first_kernel(predictor.network), run.plots / "filters.png")


def _score_clip(predictor: Predictor, settings: ClipSettings, clip: Clip, classes: Sequence[str]) -> Row:
    begun = time.monotonic()
    probabilities = predictor.logits(load_clip(clip, settings)["image"]).softmax(dim=0)
    likeliest = int(probabilities.argmax())
    return {
        "case": clip.name,
        "label": classes[clip.label],
        "predicted": classes[likeliest],
        "probability": float(probabilities[likeliest]),
        **top_k(probabilities[None], torch.tensor([clip.label]))[0],
        "seconds": time.monotonic() - begun,
    }


def _watched(cases: Sequence[T]) -> Iterable[T]:
    return track(cases, "scoring", console=screen, disable=not screen.is_terminal)


def cases_of(settings: VolumeSettings, split: str) -> list[Case]:
    """The labelled cases of a split.

    Raises:
        DataError: there is none.
    """
    cohort = read_cohort(settings.root)
    training, validation = split_cases(cohort.cases, settings)
    known = {"training": training, "validation": validation}
    chosen = known.get(split) or [case for case in cohort.cases if case.split == split]
    labelled = [case for case in chosen if case.label_files]
    if not labelled:
        raise DataError(f"{settings.root}: no labelled case in split {split!r}; try training or validation")
    return labelled


def score_case(predictors: Sequence[Predictor], case: Case) -> list[Row]:
    """A row for each label of a case, on the grid of its image file, for one network or an ensemble."""
    settings, begun = predictors[0].volumes, time.monotonic()
    image = load_image(case.images, settings)
    mask = segment(predictors, [image] * len(predictors)).mask
    seconds = time.monotonic() - begun
    label = load_label(case, settings, image.original)
    pred, truth = (sitk.DICOMOrient(part, "LPS") for part in (mask, label))
    spacing, names = spacing_dhw(pred), settings.label_names
    guess, right = (torch.from_numpy(to_array(part).astype(np.int64)) for part in (pred, truth))
    tolerance = predictors[0].prediction.tolerance
    numbers = dice_scores(guess, right, names)
    numbers |= surface_scores(guess, right, names, spacing, tolerance)
    cleaned = guess.numpy().copy()
    keep_largest(cleaned, range(1, len(names) + 1))
    largest = dice_scores(torch.from_numpy(cleaned), right, names)
    millilitres = float(np.prod(spacing)) / 1000
    return [
        {
            "case": case.name,
            "label": name,
            **{metric: numbers[f"{metric}_{name}"] for metric in ("dice", "hd95", "surface_dice")},
            "dice_largest": largest[f"dice_{name}"],
            "predicted_ml": float((guess == value).sum()) * millilitres,
            "reference_ml": float((right == value).sum()) * millilitres,
            "seconds": seconds,
        }
        for value, name in enumerate(names, start=1)
    ]


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean of each metric over the cases: by label, and over all labels under "mean".

    A label that is in neither truth nor prediction of a case leaves both means.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    table = {label: _means([row for row in rows if row["label"] == label]) for label in labels}
    return {**table, "mean": _means(rows)}


def _means(rows: Sequence[Row]) -> dict[str, float]:
    present = [metric for metric in METRICS if metric in rows[0]]
    return {metric: mean_of_present(row[metric] for row in rows) for metric in present}


def count(rows: Sequence[Row], label: str = "mean") -> int:
    """How many numbers are in a mean of `summary`: cases of a label, or of all together."""
    metric = next(metric for metric in METRICS if metric in rows[0])
    return sum(label in (row["label"], "mean") and not math.isnan(row[metric]) for row in rows)


@expendable
def _draw_overlays(predictor: Predictor, cases: Sequence[Case], rows: Sequence[Row], folder: Path) -> None:
    """Overlays of the worst, median and best case, in the network's orientation."""
    dice = {case.name: _means([row for row in rows if row["case"] == case.name])["dice"] for case in cases}
    ordered = sorted(cases, key=lambda case: np.nan_to_num(dice[case.name]))
    shown = {"worst": ordered[0], "middle": ordered[len(ordered) // 2], "best": ordered[-1]}
    for word, case in shown.items():
        sample = load_case(case, predictor.volumes)
        pred = predictor.label_map(load_image(case.images, predictor.volumes))
        title = f"{word} case {case.name}, Dice {dice[case.name]:.3f}"
        image, label = sample["image"][0].numpy(), sample["label"][0].numpy()
        plot_overlay(image, label, pred, sample["spacing"], title, folder / f"overlay_{word}.png")
