"""Metrics against independent references, and what a missing label counts."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from medi3d.engine.metrics import dice_scores, mean_row, surface_scores, top_k

SPACING = (2.5, 1.0, 0.5)


def blobs(seed):
    """A smooth random label map with the values 0, 1, 2."""
    noise = torch.nn.functional.avg_pool3d(
        torch.randn(1, 1, 14, 18, 22, generator=torch.manual_seed(seed)), 5, 1
    )
    return torch.bucketize(noise[0, 0], noise.quantile(torch.tensor([0.7, 0.85])))


def surface_mm(mask):
    edge = mask & ~binary_erosion(mask, border_value=0)
    return np.argwhere(edge) * SPACING


def distances(one, other):
    """Distances in mm from each surface voxel of one mask to the nearest of the other, both ways."""
    between = cdist(surface_mm(one), surface_mm(other))
    return between.min(axis=1), between.min(axis=0)


@pytest.mark.parametrize("seed", range(3))
def test_dice_is_twice_the_overlap_over_the_sum(seed):
    pred, label = blobs(seed), blobs(seed + 10)
    expected = {
        f"dice_{name}": 2
        * float(((pred == v) & (label == v)).sum())
        / float((pred == v).sum() + (label == v).sum())
        for v, name in ((1, "a"), (2, "b"))
    }
    assert dice_scores(pred, label, ["a", "b"]) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_hd95_is_in_millimetres(seed):
    pred, label = blobs(seed), blobs(seed + 10)
    there, back = distances((pred == 1).numpy(), (label == 1).numpy())
    expected = max(np.percentile(there, 95), np.percentile(back, 95))
    assert surface_scores(pred, label, ["a"], SPACING, 1.0)["hd95_a"] == pytest.approx(expected, rel=1e-4)


def test_surface_dice_of_a_shifted_cube():
    label = torch.zeros(12, 12, 12, dtype=torch.int64)
    label[3:8, 3:8, 3:8] = 1
    pred = label.roll(1, dims=0)  # 2.5 mm along depth
    scores = [surface_scores(pred, label, ["a"], SPACING, mm)["surface_dice_a"] for mm in (0.4, 2.6)]
    assert 0 < scores[0] < 1
    assert scores[1] == 1.0


@pytest.mark.parametrize(
    ("in_pred", "in_label", "expected"),
    [
        (False, False, {"dice_a": math.nan, "hd95_a": math.nan, "surface_dice_a": math.nan}),
        (True, False, {"dice_a": 0.0, "hd95_a": 15.0, "surface_dice_a": 0.0}),
        (False, True, {"dice_a": 0.0, "hd95_a": 15.0, "surface_dice_a": 0.0}),
    ],
    ids=["in neither", "only predicted", "only in the reference"],
)
def test_a_missing_label_counts_if_one_side_has_it(in_pred, in_label, expected):
    pred, label = torch.zeros(2, 4, 10, 10, dtype=torch.int64)
    pred[0, 0, 0], label[0, 0, 0] = int(in_pred), int(in_label)
    size = (5.0, 1.0, 0.5)  # 4 x 5, 10 x 1, 10 x 0.5 mm: diagonal sqrt(400 + 100 + 25)
    scores = dice_scores(pred, label, ["a"]) | surface_scores(pred, label, ["a"], size, 1.0)
    if in_pred or in_label:
        expected = {**expected, "hd95_a": 525**0.5}
    assert scores == pytest.approx(expected, nan_ok=True)


def test_maps_of_different_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(2, 3, 5\)"):
        dice_scores(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), ["a"])


def test_top_k_by_hand():
    logits = torch.tensor([[0.1, 0.9, 0.5, 0.3], [4.0, 3.0, 2.0, 1.0]])
    assert top_k(logits, torch.tensor([1, 2]), (1, 3)) == [
        {"top1": 1.0, "top3": 1.0},
        {"top1": 0.0, "top3": 1.0},
    ]
    assert top_k(logits[:, :2], torch.tensor([0, 1]))[0] == {"top1": 0.0, "top5": 1.0}


def test_mean_row_leaves_names_out():
    assert mean_row([{"name": "a", "dice": 0.5}, {"name": "b", "dice": 1.0}]) == {"dice": 0.75}


def test_what_is_nowhere_leaves_the_means_and_a_loss_never_does():
    nan = math.nan
    rows = [{"dice_a": 0.5, "dice_b": nan, "loss": 1.0}, {"dice_a": nan, "dice_b": nan, "loss": 3.0}]
    assert mean_row(rows) == pytest.approx({"dice_a": 0.5, "dice_b": math.nan, "loss": 2.0}, nan_ok=True)
    assert math.isnan(mean_row([*rows, {**rows[0], "loss": math.nan}])["loss"])
