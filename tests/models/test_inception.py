import copy
from math import ceil

import pytest
import torch
from torch import nn

from medi3d.errors import ShapeError, SourceError
from medi3d.models.inception import (
    DEFAULT_END_POINTS,
    LAYERS,
    BatchNormWithoutScale,
    InceptionV1,
    InceptionV1Classifier,
)


@pytest.mark.parametrize("size", [(64, 64), (45, 70)], ids=["even", "odd"])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_maps_have_the_declared_channels_and_strides(size, stem_stride):
    network = InceptionV1(stem_stride=stem_stride).eval()
    maps = network(torch.randn(2, 3, *size))
    assert [m.shape[1] for m in maps] == network.out_channels == [64, 192, 480, 832, 1024]
    assert network.strides == [stem_stride * s for s in (1, 2, 4, 8, 16)]
    expected = [tuple(ceil(s / stride) for s in size) for stride in network.strides]
    assert [tuple(m.shape[2:]) for m in maps] == expected


def test_every_end_point_can_be_asked_for_and_comes_in_order():
    network = InceptionV1(tuple(reversed(LAYERS))).eval()
    maps = network(torch.randn(1, 3, 32, 32))
    assert network.end_points == LAYERS
    assert [m.shape[1] for m in maps] == network.out_channels


def test_only_layers_up_to_the_last_end_point_are_built():
    assert list(dict(InceptionV1(("Mixed_3c",)).named_children())) == list(LAYERS[:7])


def test_an_end_point_is_the_same_whatever_else_is_asked_for():
    torch.manual_seed(1)
    alone = InceptionV1(("Mixed_3b",)).eval()
    together = InceptionV1((*DEFAULT_END_POINTS, "Mixed_3b")).eval()
    together.load_state_dict(alone.state_dict(), strict=False)
    image = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(alone(image)[0], together(image)[2])


@pytest.mark.parametrize("end_points", [(), ("Mixed_3c", "Mixed_9z")], ids=["none", "unknown"])
def test_unknown_end_points_are_refused(end_points):
    with pytest.raises(SourceError, match="choose one or more of Conv3d_1a_7x7"):
        InceptionV1(end_points)


def test_strided_layers_pad_as_tensorflow_does():
    # 8 pixels, kernel 7, stride 2: 2 zeros before and 3 after; a symmetric 3 would shift the picture.
    conv = InceptionV1(("Conv3d_1a_7x7",)).Conv3d_1a_7x7.conv
    image = torch.randn(1, 3, 8, 8)
    expected = nn.functional.conv2d(nn.functional.pad(image, (2, 3, 2, 3)), conv.weight, stride=2)
    torch.testing.assert_close(conv(image), expected)


def test_pools_ignore_their_padding():
    image = torch.full((1, 64, 5, 5), -3.0)
    assert (InceptionV1(("MaxPool3d_2a_3x3",)).MaxPool3d_2a_3x3(image) == -3).all()


def test_classifier_has_as_many_published_tensors_as_the_checkpoint():
    tensors = {k: v for k, v in InceptionV1Classifier().state_dict().items() if "num_batches" not in k}
    assert len(tensors) == 230
    assert set(InceptionV1().state_dict()) == {
        k for k in InceptionV1Classifier().state_dict() if not k.startswith("Logits")
    }


def test_classifier_averages_its_logits_over_space():
    network = InceptionV1Classifier(5).eval()
    features = torch.randn(2, 1024, 8, 9)
    by_hand = network.Logits.Conv3d_0c_1x1(nn.functional.avg_pool2d(features, 7, 1)).mean((2, 3))
    torch.testing.assert_close(network.Logits(features), by_hand)
    assert network(torch.randn(1, 3, 224, 224)).shape == (1, 5)


def test_too_small_images_are_refused_by_the_head():
    with pytest.raises(ShapeError, match="193 x 193 at least"):
        InceptionV1Classifier()(torch.randn(2, 3, 192, 224))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_norm_equals_a_norm_whose_scale_is_one(training):
    ours, plain = BatchNormWithoutScale(4), nn.BatchNorm2d(4, eps=1e-3)
    nn.init.normal_(ours.bias)
    plain.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(ours.train(training)(x), plain.train(training)(x))
    torch.testing.assert_close(ours.running_var, plain.running_var)


def test_norm_is_copied_converted_and_reset_like_any_other():
    norm = copy.deepcopy(BatchNormWithoutScale(4)).double()
    nn.init.normal_(norm.bias)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm(torch.randn(2, 4, 3, 3).double()).dtype == torch.float64
    norm.reset_parameters()
    assert not norm.bias.any()
    assert set(dict(norm.named_parameters())) == {"bias"}


def test_every_parameter_learns():
    network = InceptionV1()
    sum(m.mean() for m in network(torch.randn(2, 3, 64, 64))).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
