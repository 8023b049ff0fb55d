"""Scores of a prediction: Dice, Hausdorff distance and surface Dice per label in mm, and top-k accuracy.

MONAI computes the numbers; this module defines them where a label is missing. NaN leaves the means (see
`mean_row`), which are reported with their number of cases:

===================================  ======  =======================  ============
label is in                          Dice    HD95 (mm)                surface Dice
===================================  ======  =======================  ============
both                                 as defined
neither                              NaN     NaN                      NaN
only one of prediction, reference    0       diagonal of the volume   0
===================================  ======  =======================  ============
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from torch import Tensor
from torch.nn.functional import one_hot

Row = dict[str, Any]
"""Column -> number; the row of a case also has its "name"."""


def _check_maps(pred: Tensor, label: Tensor) -> None:
    if pred.shape != label.shape or pred.ndim != 3:
        raise ValueError(
            f"label maps of shape {tuple(pred.shape)} and {tuple(label.shape)}: both must be (D, H, W)"
        )


def _masks(label: Tensor, count: int) -> Tensor:
    """Label map `(D, H, W)` -> masks `(1, count, D, H, W)` of the labels 1 .. count."""
    return one_hot(label.long(), count + 1).permute(3, 0, 1, 2)[None, 1:]


def dice_scores(pred: Tensor, label: Tensor, labels: Sequence[str]) -> Row:
    """Dice per label of one case, under `dice_NAME`; NaN where the label is in neither map.

    Args:
        pred: label map `(D, H, W)` with the values 0 .. len(labels).
        label: the reference, of the same shape.
        labels: names of the labels 1, 2, ...
    """
    _check_maps(pred, label)
    count = len(labels)
    scores = compute_dice(
        _masks(pred, count), _masks(label, count), include_background=True, ignore_empty=False
    )
    present = set(pred.unique().tolist()) | set(label.unique().tolist())
    return {
        f"dice_{name}": float(score) if number in present else math.nan
        for number, (name, score) in enumerate(zip(labels, scores[0], strict=True), start=1)
    }


def surface_scores(
    pred: Tensor, label: Tensor, labels: Sequence[str], spacing: Sequence[float], tolerance: float
) -> Row:
    """HD95 in mm (`hd95_NAME`) and surface Dice (`surface_dice_NAME`) per label of one case; NaN as Dice.

    Args:
        pred: label map `(D, H, W)`.
        label: the reference, of the same shape.
        labels: names of the labels 1, 2, ...
        spacing: voxel size in mm, (D, H, W).
        tolerance: distance in mm up to which two surfaces agree.
    """
    _check_maps(pred, label)
    diagonal = sum((size * step) ** 2 for size, step in zip(pred.shape, spacing, strict=True)) ** 0.5
    row: Row = {}
    for number, name in enumerate(labels, start=1):
        one, other = pred == number, label == number
        if one.any() and other.any():
            distance, agreement = _surfaces(one, other, spacing, tolerance)
        else:
            both_empty = not (one.any() or other.any())
            distance, agreement = (math.nan, math.nan) if both_empty else (diagonal, 0.0)
        row |= {f"hd95_{name}": distance, f"surface_dice_{name}": agreement}
    return row


def _surfaces(one: Tensor, other: Tensor, spacing: Sequence[float], tolerance: float) -> tuple[float, float]:
    """HD95 in mm and surface Dice of two masks `(D, H, W)` that are not empty."""
    one, other, step = one[None, None].float(), other[None, None].float(), [float(s) for s in spacing]
    with warnings.catch_warnings():
        # MONAI 1.6 warns of an argument that it passes to itself.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        distance = compute_hausdorff_distance(
            one, other, include_background=True, percentile=95, spacing=step
        )
        agreement = compute_surface_dice(one, other, [tolerance], include_background=True, spacing=step)
    return float(distance), float(agreement)


def top_k(logits: Tensor, label: Tensor, ks: Sequence[int] = (1, 5)) -> list[Row]:
    """Whether the true class is among the k highest: 1 or 0 under `topK`, one row per item of the batch.

    Args:
        logits: `(B, classes)`, or anything in their order.
        label: `(B,)` class numbers.
        ks: values of k; more than the number of classes means all.
    """
    order = logits.topk(min(max(ks), logits.shape[1])).indices
    hits = order == label[:, None]
    return [{f"top{k}": float(hit[:k].any()) for k in ks} for hit in hits]


def mean_row(rows: Sequence[Mapping[str, float]]) -> Row:
    """Mean of each column over the cases in which it is not NaN; NaN where it is in all.

    A text column is left out. A loss is never left out: where one is NaN, so is its mean.
    """
    names = [name for name, value in rows[0].items() if isinstance(value, int | float)] if rows else []
    columns = {name: [float(row[name]) for row in rows] for name in names}
    return {
        name: sum(values) / len(values) if name == "loss" else mean_of_present(values)
        for name, values in columns.items()
    }


def mean_of_present(values: Iterable[float]) -> float:
    """The mean of those that are not NaN; NaN where none is."""
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan
