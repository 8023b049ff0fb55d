"""Whole volumes: windows agree with one pass, mirroring is undone, precision and memory format."""

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from medi3d.engine.inference import SlidingWindow, mirrored, predict, predict_labels, single_forward
from medi3d.engine.precision import Precision
from medi3d.engine.task import classification, segmentation
from medi3d.errors import ConfigError

FP32 = Precision(torch.device("cpu"), bf16=False)


class Threshold(nn.Module):
    """Class 1 where the image is positive."""

    def forward(self, x):
        return torch.cat([-x, x], dim=1)


@pytest.mark.parametrize(
    ("patch", "shown"), [((4, 4, 4), (5, 8, 7)), ((6, 6, 6), (6, 8, 7)), (None, (8, 8, 8))], ids=str
)
def test_a_volume_that_fits_is_seen_once_and_no_smaller_than_the_patches_of_the_training(patch, shown):
    image, seen = torch.randn(1, 1, 5, 8, 7), []
    inferer = SlidingWindow((8, 8, 8), patch=patch)
    assert torch.equal(inferer(image, lambda x: seen.append(tuple(x.shape)) or x), image)
    assert seen == [(1, 1, *shown)]


@pytest.mark.parametrize("shape", [(9, 8, 8), (20, 17, 13), (4, 30, 8)], ids=str)
def test_windows_agree_with_one_pass(shape):
    image = torch.randn(1, 1, *shape)
    pointwise = nn.Conv3d(1, 3, 1)
    windows = SlidingWindow((8, 8, 8))(image, pointwise)
    torch.testing.assert_close(windows, pointwise(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(21, 9, 16), (8, 17, 12), (30, 8, 8)], ids=str)
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_windows_are_averaged_as_by_monai(shape, overlap):
    image, network = torch.randn(2, 1, *shape), nn.Conv3d(1, 3, 3, padding=1)
    with torch.no_grad():
        expected = SlidingWindowInferer((8, 8, 8), 2, overlap, mode="gaussian")(image, network)
        torch.testing.assert_close(SlidingWindow((8, 8, 8), overlap, 3)(image, network), expected)


@pytest.mark.parametrize(("size", "seen"), [(8, [2, 3]), (64, [2, 3]), (96, [1] * 5)], ids=str)
def test_small_windows_are_seen_together_and_none_of_them_alone(size, seen):
    found = []
    image = torch.zeros(1, 1, size, size, 3 * size)
    SlidingWindow((size,) * 3)(image, lambda x: found.append(len(x)) or x)
    assert found == seen


def test_slabs_come_in_order_and_hold_no_more_slices_than_a_window():
    image = torch.randn(1, 30, 9, 9)
    slabs = list(SlidingWindow((8, 8, 8)).slabs(image, lambda x: x))
    assert max(slab.shape[1] for slab in slabs) <= 8
    torch.testing.assert_close(torch.cat(slabs, dim=1), image)


def test_a_thin_volume_goes_on_with_its_border():
    image, seen = torch.randn(1, 1, 3, 20, 8), []
    SlidingWindow((8, 8, 8))(image, lambda x: seen.append(x) or x)
    assert torch.equal(seen[0][0, 0, 0], image[0, 0, 0, :8])
    assert torch.equal(seen[0][0, 0, -1], image[0, 0, -1, :8])


@pytest.mark.parametrize("axes", [["width"], ["depth", "height", "width"]], ids=len)
def test_mirroring_is_undone(axes):
    image = torch.randn(1, 1, 4, 5, 6)
    torch.testing.assert_close(mirrored(Threshold(), axes)(image), Threshold()(image))


def test_a_class_with_a_side_is_told_by_its_side_in_the_mirror_too():
    def sides(x):  # class 1 is the left half, class 2 the right one, whatever the image
        left = (torch.arange(x.shape[-1]) < x.shape[-1] / 2).expand(x.shape).float()
        return torch.cat([torch.zeros_like(x), left, 1 - left], dim=1)

    image = torch.zeros(1, 1, 4, 5, 6)
    torch.testing.assert_close(mirrored(sides, ["width", "depth"], [(1, 2)])(image), sides(image))
    assert not torch.allclose(mirrored(sides, ["width"])(image), sides(image))


def test_mirroring_averages_what_differs():
    position = torch.linspace(-1, 1, 6).expand(1, 1, 4, 5, 6)
    logits = mirrored(lambda x: Threshold()(x + position), ["width"])(torch.zeros(1, 1, 4, 5, 6))
    torch.testing.assert_close(logits, logits.flip(4))


def test_labels_are_those_of_the_highest_logit():
    image = torch.randn(1, 4, 5, 6)
    for inferer in (single_forward, SlidingWindow((3, 3, 3))):
        labels = predict_labels(image, Threshold(), inferer)
        assert labels.dtype == "uint8"
        assert (labels == (image[0] > 0).numpy()).all()
    assert predict(image, Threshold(), single_forward, FP32).shape == (2, 4, 5, 6)


def test_bf16_lays_weights_and_images_out_channels_last():
    precision = Precision(torch.device("cpu"), bf16=True)
    network = precision.place_network(
        nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.Conv3d(4, 2, 3))
    )
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    image = precision.place(torch.randn(1, 2, 6, 6, 6))
    assert image.is_contiguous(memory_format=torch.channels_last_3d)
    with precision.autocast():
        assert network(image).dtype == torch.bfloat16


def test_precision_refuses_another_word():
    assert not Precision.choose("fp32", "cpu").bf16
    with pytest.raises(ConfigError, match=r"training.precision: 'fp16' is none of auto, fp32, bf16"):
        Precision.choose("fp16", "cpu")


def test_segmentation_loss_sums_the_levels_of_deep_supervision():
    task = segmentation(["a", "b"], (8, 8, 8))
    target = torch.randint(0, 3, (2, 1, 8, 8, 8)).float()
    fine, coarse = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 3, 4, 4, 4)
    half = torch.nn.functional.interpolate(target, (4, 4, 4), mode="nearest-exact")
    expected = task.loss(fine, target) + 0.5 * task.loss(coarse, half)
    torch.testing.assert_close(task.loss([fine, coarse], target), expected)


def test_a_right_segmentation_scores_one_and_loses_little():
    task = segmentation(["a"], (8, 8, 8))
    image = torch.randn(2, 1, 4, 4, 4)
    target = (image > 0).float()
    logits = Threshold()(100 * image)
    assert task.loss(logits, target) < 0.02
    assert task.metrics(task.postprocess(logits), target) == [{"dice": 1.0, "dice_a": 1.0}] * 2


def test_classification_by_hand():
    task = classification(["a", "b", "c"])
    logits, target = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
    assert float(task.loss(logits, target)) == pytest.approx(0.2395, abs=1e-4)  # -log(e^2 / (e^2 + 2))
    assert task.metrics(task.postprocess(logits), target)[0]["top1"] == 1.0
