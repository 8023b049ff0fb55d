"""How good a run's best network is, case by case, on the grids that the scans came on."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

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
from medi3d.engine.log import console, log
from medi3d.engine.metrics import Row, dice_scores, surface_scores, top_k
from medi3d.engine.precision import evaluating
from medi3d.errors import ConfigError, DataError, WeightsError
from medi3d.experiment.building import make_network, make_task
from medi3d.experiment.settings import ClassificationExperiment, Experiment, SegmentationExperiment
from medi3d.files import write_table
from medi3d.prediction.postprocessing import decide, keep_largest, write_largest
from medi3d.prediction.predictor import Predictor, load_members, segment
from medi3d.reports.filters import first_kernel, plot_filters_over_time
from medi3d.reports.plots import plot_confusion, plot_overlay
from medi3d.reports.run_report import write_report

T = TypeVar("T")
METRICS = ("dice", "hd95", "surface_dice", "top1", "top5")
"""Columns of `cases.csv` that have a mean."""


def run_evaluation(experiment: Experiment, folder: Path, split: str = "validation") -> list[Row]:
    """Predict and judge the cases of a split with the best network of a run.

    Writes `cases.csv` (for another split `cases_SPLIT.csv`), pictures and `report.html` into the run folder.
    The validation also decides of which labels only the largest component is kept from then on.

    Args:
        experiment: of the run, from its `config.yaml`.
        folder: the run folder; of a cross-validation, whose folds are averaged.
        split: "training", "validation", or a name in the cohort's own list.

    Returns:
        Segmentation: a row per case and label with dice, hd95 (mm), surface_dice, dice_largest (with the
        largest component alone), volumes in ml, seconds.
        Classification: a row per clip with its label, the predicted one, its probability, top1 and top5.

    Raises:
        DataError: no case is in the split, or one is damaged.
        WeightsError: the run has no usable checkpoint.
    """
    if isinstance(experiment, SegmentationExperiment):
        predictors = load_members(experiment, folder)
        if split == "validation":  # it decides about post-processing, so it is judged without
            predictors = [replace(one, largest=()) for one in predictors]
        rows = _judge_volumes(predictors, split, folder / "plots")
        if split == "validation":
            write_largest(folder, decide(rows))
    elif isinstance(experiment, ClassificationExperiment):
        predictor = Predictor.load(experiment, folder)
        rows = _judge_clips(predictor, experiment, split, folder / "plots")
    else:
        raise ConfigError(f"task is {experiment.task!r}: cannot be evaluated")
    write_table(folder / ("cases.csv" if split == "validation" else f"cases_{split}.csv"), rows)
    means = summary(rows)
    table = [{"label": label, **numbers} for label, numbers in means.items()]
    report = write_report(experiment, folder, {f"Mean over the {split} cases": table, "Cases": rows})
    log.info(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in means["mean"].items()))
    log.info(f"report: {report}")
    return rows


def _judge_volumes(predictors: Sequence[Predictor], split: str, plots: Path) -> list[Row]:
    experiment: Any = predictors[0].experiment
    cases = cases_of(experiment.data, split)
    rows = [row for case in _watched(cases) for row in judge_case(predictors, case)]
    if len(predictors) == 1:  # an ensemble has no label map on the network's grid
        _draw_overlays(predictors[0], experiment, cases, rows, plots)
    return rows


@evaluating()
def _judge_clips(
    predictor: Predictor, experiment: ClassificationExperiment, split: str, plots: Path
) -> list[Row]:
    listed = read_clip_list(experiment.data)
    training, validation = split_clips(listed.clips, experiment.data)
    clips = {"training": training, "validation": validation}.get(split)
    if clips is None:
        clips = [clip for clip in listed.clips if clip.split == split]
    if not clips:
        raise DataError(f"{experiment.data.root}: no clip in split {split!r}; try training or validation")
    rows = [_judge_clip(predictor, experiment.data, clip, listed.classes) for clip in _watched(clips)]
    pairs = [(row["label"], row["predicted"]) for row in rows]
    plot_confusion(pairs, listed.classes, plots / "confusion.png")
    _draw_filters(predictor, plots)
    return rows


def _draw_filters(predictor: Predictor, plots: Path) -> None:
    try:
        before = make_network(predictor.experiment, make_task(predictor.experiment))
    except WeightsError as error:  # the run may have come from a machine that had them
        log.info(f"no picture of the filters: {error}")
        return
    plot_filters_over_time(first_kernel(before), first_kernel(predictor.network), plots / "filters.png")


def _judge_clip(predictor: Predictor, settings: ClipSettings, clip: Clip, classes: Sequence[str]) -> Row:
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
    return track(cases, "judging", console=console, disable=not console.is_terminal)


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


def judge_case(predictors: Sequence[Predictor], case: Case) -> list[Row]:
    """A row for each label of one case, on the grid of its image file, by one network or several."""
    experiment: Any = predictors[0].experiment
    begun = time.monotonic()
    image = load_image(case.images, experiment.data)
    mask = segment(predictors, [image] * len(predictors)).mask
    seconds = time.monotonic() - begun
    label = load_label(case, experiment.data, image.original)
    pred, truth = (sitk.DICOMOrient(part, "LPS") for part in (mask, label))
    spacing, names = spacing_dhw(pred), experiment.data.label_names
    guess, right = (torch.from_numpy(to_array(part).astype(np.int64)) for part in (pred, truth))
    tolerance = experiment.prediction.tolerance
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
    """Mean of each metric over the cases, by label, and under "mean" over the labels too."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    table = {label: _means([row for row in rows if row["label"] == label]) for label in labels}
    return {**table, "mean": _means(rows)}


def _means(rows: Sequence[Row]) -> dict[str, float]:
    present = [metric for metric in METRICS if metric in rows[0]]
    return {metric: sum(row[metric] for row in rows) / len(rows) for metric in present}


def _draw_overlays(
    predictor: Predictor,
    experiment: SegmentationExperiment,
    cases: Sequence[Case],
    rows: Sequence[Row],
    folder: Path,
) -> None:
    """The worst, the middle and the best case, in the orientation that the network sees."""
    dice = {case.name: _means([row for row in rows if row["case"] == case.name])["dice"] for case in cases}
    ordered = sorted(cases, key=lambda case: dice[case.name])
    shown = {"worst": ordered[0], "middle": ordered[len(ordered) // 2], "best": ordered[-1]}
    for word, case in shown.items():
        sample = load_case(case, experiment.data)
        pred = predictor.label_map(load_image(case.images, experiment.data))
        title = f"{word} case {case.name}, Dice {dice[case.name]:.3f}"
        image, label = sample["image"][0].numpy(), sample["label"][0].numpy()
        plot_overlay(image, label, pred, sample["spacing"], title, folder / f"overlay_{word}.png")
