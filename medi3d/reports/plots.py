"""The pictures of a run: curves of a training, a case with reference and prediction, a confusion matrix."""

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state

from medi3d.engine.metrics import Row
from medi3d.errors import printable
from medi3d.files import writing, written_aside

P = ParamSpec("P")
log = logging.getLogger(__name__)
REFERENCE, PREDICTION = "#00c853", "#ff1744"


def plain(text: str) -> str:
    """Text of a user for a figure, where matplotlib would read $ as mathematics."""
    return printable(text).replace("$", r"\$")


def expendable(draw: Callable[P, None]) -> Callable[P, None]:
    """A function that draws, so that its failure is a line in the log: no picture may cost a result."""

    @wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            draw(*arguments, **options)
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            log.warning("no picture (%s): %s: %s", draw.__name__.strip("_"), type(error).__name__, line)

    return drawn


@expendable
def plot_curves(rows: Sequence[Row], score: str, path: Path) -> None:
    """Losses and scores over the steps. `rows` are those of `metrics.csv`; all `score*` columns are drawn."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    for name in ("train_loss", "val_loss"):
        losses.plot(steps, [row[name] for row in rows], marker=".", label=name.replace("_", " "))
    for name in [column for column in rows[0] if column.startswith(score)]:
        scores.plot(steps, [row[name] for row in rows], marker=".", label=name.replace("_", " "))
    losses.set(xlabel="step", ylabel="loss")
    scores.set(xlabel="step", ylabel=score, ylim=(0, 1))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


@expendable
def plot_overlay(
    image: np.ndarray,
    label: np.ndarray,
    pred: np.ndarray,
    spacing: Sequence[float],
    title: str,
    path: Path,
) -> None:
    """Three planes through the reference, with the outlines of reference (green) and prediction (red).

    Args:
        image: `(D, H, W)`, D to superior, H to posterior, W to left.
        label: reference label map of the same shape.
        pred: predicted label map of the same shape.
        spacing: voxel size in mm, (D, H, W).
        title: above the picture.
        path: a PNG.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(plain(f"{title}   reference green, prediction red"))
    marked = label if label.any() else pred
    centre = [_fullest_slice(marked, axis) for axis in range(3)]
    planes = zip(figure.subplots(1, 3), range(3), ("axial", "coronal", "sagittal"), strict=True)
    for axes, axis, name in planes:
        across = [step for other, step in enumerate(spacing) if other != axis]
        flip = slice(None, None, -1 if axis else 1)  # superior is up where depth is a row
        shown, truth, guess = (np.take(part, centre[axis], axis)[flip] for part in (image, label, pred))
        axes.imshow(shown, cmap="gray", aspect=across[0] / across[1], interpolation="nearest")
        for mask, colour in ((truth, REFERENCE), (guess, PREDICTION)):
            for value in np.unique(mask[mask > 0]):
                outline(axes, mask == value, colour)
        axes.set(title=f"{name}, slice {centre[axis]}", xticks=[], yticks=[])
    save_figure(figure, path)


def outline(axes: Axes, mask: np.ndarray, colour: str, width: float = 1.2) -> None:
    """The contour of a mask `(rows, columns)`: closed at the picture's border, and one pixel wide too."""
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    axes.contour(columns, rows, np.pad(mask, 1), levels=[0.5], colors=colour, linewidths=width)


@expendable
def plot_confusion(pairs: Sequence[tuple[str, str]], classes: Sequence[str], path: Path) -> None:
    """A confusion matrix; `pairs` are (true, predicted)."""
    side = 3 + 0.35 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    draw_confusion(figure.subplots(), pairs, classes)
    save_figure(figure, path)


def draw_confusion(axes: Axes, pairs: Sequence[tuple[str, str]], classes: Sequence[str]) -> None:
    """A table of counts: true classes in rows, predicted classes in columns."""
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    for right, predicted in pairs:
        counts[classes.index(right), classes.index(predicted)] += 1
    axes.imshow(counts, cmap="Blues")
    ticks: dict[str, Any] = {"xticks": range(len(classes)), "yticks": range(len(classes))}
    axes.set(xlabel="predicted", ylabel="true", **ticks)
    names = [plain(name) for name in classes]
    axes.set_xticklabels(names, rotation=90)
    axes.set_yticklabels(names)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if count > counts.max() / 2 else "black"
            axes.text(column, row, str(count), color=colour, ha="center", va="center")


@expendable
def plot_pretext(rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], path: Path) -> None:
    """The middle slice of some patches of a pretraining: input, answer, target; each `(D, H, W)`."""
    figure = Figure(figsize=(7, 2.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for line, parts in zip(grid, rows, strict=True):
        low, high = parts[2].min(), parts[2].max()
        ranges = ((-1, 1), (low, high), (low, high))
        for axes, part, title, (least, most) in zip(
            line, parts, ("input", "answer", "target"), ranges, strict=True
        ):
            axes.imshow(part[len(part) // 2], cmap="gray", vmin=least, vmax=most, interpolation="nearest")
            axes.set(title=title, xticks=[], yticks=[])
    save_figure(figure, path)


def _fullest_slice(mask: np.ndarray, axis: int) -> int:
    """Index of the slice across `axis` with the most labelled voxels; the middle slice if there is none."""
    counts = (mask > 0).sum(axis=tuple(other for other in range(3) if other != axis))
    return int(counts.argmax()) if counts.any() else mask.shape[axis] // 2


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure in the format of its suffix; an SVG keeps text as text and is reproducible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "medi3d"}
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with writing(path), written_aside(path) as aside, matplotlib.rc_context(settings):
        figure.savefig(aside, format=path.suffix[1:], dpi=110, metadata=metadata, bbox_inches="tight")
    return path
