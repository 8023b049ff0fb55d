"""Figures of a comparison that need its networks: cases, filters, and how far training moved them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from medi3d.comparison.findings import Finding
from medi3d.comparison.grid import Cell, Point
from medi3d.comparison.results import Results
from medi3d.datasets.clips.clips import Clip, load_clip
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.datasets.cohorts.cases import load_case
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.preprocessing import load_image
from medi3d.experiment.tasks import build_network, build_task
from medi3d.models.norms import batch_norms
from medi3d.prediction.predictor import Predictor
from medi3d.reports.filters import first_kernel
from medi3d.reports.plots import PREDICTION, REFERENCE, draw_confusion, outline, plain, save_figure

FILTERS = 12


@dataclass(frozen=True)
class Trained:
    """A run's network, before and after training."""

    point: Point
    cell: Cell
    before: nn.Module
    after: Predictor

    @classmethod
    def load(cls, results: Results, point: Point) -> "Trained":
        """Build both; pretrained weights are read again."""
        cell = results.cells[point]
        before = build_network(cell.experiment, build_task(cell.experiment)).eval()
        return cls(point, cell, before, Predictor.load(cell.run(results.grid.folder / "cells")))

    @property
    def name(self) -> str:
        """Arm and strategy."""
        return f"{self.point.arm}, {self.point.strategy}"


def load_pair(results: Results, finding: Finding) -> tuple[Trained, Trained]:
    """Reference and arm of a finding, at the first seed that both have."""
    seeds = results.complete_seeds(finding.point)
    seed = next(seed for seed in seeds if seed in results.complete_seeds(finding.reference))
    points = (replace(point, seed=seed, fold=0) for point in (finding.reference, finding.point))
    reference, arm = (Trained.load(results, point) for point in points)
    return reference, arm


def plot_cases(results: Results, pair: tuple[Trained, Trained], path: Path) -> Path:
    """Best, median and worst case of the arm: scan, and the outlines of reference arm and arm."""
    dice = [results.done[trained.point].scores("dice") for trained in pair]
    ordered = sorted(dice[1], key=dice[1].__getitem__)
    shown = {"best": ordered[-1], "median": ordered[len(ordered) // 2], "worst": ordered[0]}
    cases: dict[str, Any] = {case.name: case for case in pair[1].cell.parts.evaluation}
    figure = Figure(figsize=(8.5, 10.5), layout="constrained")
    for line, (word, name) in zip(figure.subplots(3, 2), shown.items(), strict=True):
        for axes, trained, scores in zip(line, pair, dice, strict=True):
            _draw_case(axes, trained, cases[name])
            title = plain(f"{word}: {name}\n{trained.name}: Dice {scores[name]:.3f}")
            axes.set_title(title, size=10)
    return save_figure(figure, path)


def plot_confusions(results: Results, pair: tuple[Trained, Trained], path: Path) -> Path:
    """How often each class was taken for which, by reference and arm: one seed, clips of all folds."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    for axes, trained in zip(figure.subplots(1, 2), pair, strict=True):
        folds = range(results.grid.comparison.folds)
        runs = [results.done[replace(trained.point, fold=fold)] for fold in folds]
        pairs = [(row["label"], row["predicted"]) for run in runs for row in run.cases]
        right = sum(one == other for one, other in pairs)
        draw_confusion(axes, pairs, build_task(trained.cell.experiment).classes)
        axes.set_title(f"{trained.name}: {right} of {len(pairs)}", size=10)
    return save_figure(figure, path)


def _draw_case(axes: Axes, trained: Trained, case: Case) -> None:
    """The axial slice with most of the label: reference green, prediction red."""
    settings: Any = trained.cell.experiment.data
    sample, predictor = load_case(case, settings), trained.after
    pred = predictor.label_map(load_image(case.images, settings))
    label, spacing = sample["label"][0].numpy(), sample["spacing"]
    number = int((label > 0).sum(axis=(1, 2)).argmax())
    axes.imshow(sample["image"][0, number].numpy(), cmap="gray", aspect=spacing[1] / spacing[2])
    for mask, colour in ((label[number], REFERENCE), (pred[number], PREDICTION)):
        for value in np.unique(mask[mask > 0]):
            outline(axes, mask == value, colour, 1.4)
    axes.set(xticks=[], yticks=[])


def plot_filters(pair: tuple[Trained, Trained], path: Path) -> Path:
    """The middle slice of the strongest filters of the first layer, before and after training."""
    rows = [
        (f"{trained.name}, {when}", first_kernel(network))
        for trained in pair
        for when, network in (("before", trained.before), ("after", trained.after.network))
    ]
    figure = Figure(figsize=(10, 0.95 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), FILTERS, squeeze=False)
    for number, (line, (words, kernel)) in enumerate(zip(grid, rows, strict=True)):
        if number % 2 == 0:  # a filter keeps its place from before to after
            strongest = kernel.flatten(1).norm(dim=1).argsort(descending=True)[:FILTERS]
        for axes, index in zip(line, strongest, strict=False):
            plane = kernel[index].mean(dim=0)[kernel.shape[2] // 2]
            axes.imshow(plane.numpy(), cmap="gray", interpolation="nearest")
        for axes in line:
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(words.replace(", ", "\n"), rotation=0, ha="right", va="center", size=9)
    return save_figure(figure, path)


def plot_drift(pair: tuple[Trained, Trained], path: Path) -> Path:
    """How far training moved the features of each encoder level, and the statistics of each batch norm."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    levels, norms = figure.subplots(1, 2)
    for number, trained in enumerate(pair):
        look = {"color": f"C{number}", "marker": "o", "label": trained.name}
        drift = feature_drift(trained)
        levels.plot(range(1, len(drift) + 1), drift, **look)
        shifts = norm_shifts(trained)
        if shifts:
            norms.plot(range(1, len(shifts) + 1), shifts, **look | {"marker": "."})
    levels.set(xlabel="encoder level", ylabel="‖after − before‖ / ‖before‖", title="activations")
    levels.set_yscale("symlog", linthresh=0.1)  # untrained networks start from almost nothing
    levels.set_xticks(range(1, len(drift) + 1))
    norms.set(xlabel="batch norm, from the input on", ylabel="rms shift, deviations", title="running means")
    for axes in (levels, norms):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "no batch norm", ha="center", transform=axes.transAxes)
    return save_figure(figure, path)


@torch.no_grad()
def feature_drift(trained: Trained) -> list[float]:
    """||after - before|| / ||before|| of each encoder level's map, on the first evaluation case.

    With two streams, the levels of one follow those of the other.
    """
    settings, first = trained.cell.experiment.data, trained.cell.parts.evaluation[0]
    if isinstance(settings, ClipSettings):
        assert isinstance(first, Clip)
        shown = load_clip(first, settings)["image"][None]
    else:
        assert isinstance(first, Case)
        shown = _centre(load_image(first.images, settings).image, settings.patch)[None]
    old = _encoder_maps(trained.before, shown)
    new = _encoder_maps(trained.after.network, trained.after.precision.place(shown))
    return [float((b - a).norm() / a.norm().clamp(min=1e-12)) for a, b in zip(old, new, strict=True)]


def _encoder_maps(network: Any, image: Tensor) -> list[Tensor]:
    """The maps of each encoder at its first call on `image`."""
    encoders = network.encoder if isinstance(network.encoder, nn.ModuleList) else [network.encoder]
    seen: dict[int, list[Tensor]] = {}

    def keep(number: int) -> Any:
        def hook(_: nn.Module, __: Any, maps: list[Tensor]) -> None:
            seen.setdefault(number, [part.float().cpu() for part in maps])

        return hook

    hooks = [encoder.register_forward_hook(keep(number)) for number, encoder in enumerate(encoders)]
    try:
        network(image)
    finally:
        for one in hooks:
            one.remove()
    return [part for number in sorted(seen) for part in seen[number]]


def norm_shifts(trained: Trained) -> list[float]:
    """For each batch norm, the rms over channels of the shift of its mean, in its standard deviations."""
    before: Any = trained.before
    after: Any = trained.after.network
    shifts = []
    for old, new in zip(*(batch_norms(one.encoder).values() for one in (before, after)), strict=True):
        assert old.running_mean is not None
        assert new.running_mean is not None
        assert old.running_var is not None
        moved = (new.running_mean.cpu() - old.running_mean) / (old.running_var + old.eps).sqrt()
        shifts.append(float(moved.square().mean().sqrt()))
    return shifts


def _centre(image: Tensor, size: list[int]) -> Tensor:
    """The centre crop of `(C, D, H, W)`, at most `size`."""
    cut = [slice(max(0, (have - want) // 2), None) for have, want in zip(image.shape[1:], size, strict=True)]
    depth, height, width = cut
    return image[:, depth, height, width][:, : size[0], : size[1], : size[2]]
