"""Each rule alone: on equal slices it is its 2D layer, at every depth, and it fails when broken."""

import copy
from dataclasses import replace

import pytest
import timm  # noqa: F401 - conftest has installed the shim
import torch
from timm.layers import AvgPool2dSame, BlurPool2d, Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from medi3d.inflation import KernelPlan, inflate, verify
from medi3d.inflation.fold import Fold, merge_depth, pad_depth, split_depth
from medi3d.inflation.network import build
from medi3d.inflation.rules import AvgPoolRule, ConvRule, MaxPoolRule, find_rule
from medi3d.inflation.rules.pooling import PoolRule

LAYERS = {
    "conv": nn.Conv2d(3, 4, 3, padding=1),
    "strided": nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "seven": nn.Conv2d(3, 4, 7, stride=2, padding=3, bias=False),
    "valid": nn.Conv2d(3, 4, 3),
    "dilated": nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    "grouped": nn.Conv2d(6, 4, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 4, 5, padding=2, groups=4),
    "depthwise-strided": nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4),
    "depthwise-dilated": nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
    "pointwise-strided": nn.Conv2d(3, 4, 1, stride=2),
    "patchify": nn.Conv2d(3, 4, 4, stride=4),
    "flat": nn.Conv2d(3, 4, (1, 7), padding=(0, 3)),
    "reflect": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "same-text": nn.Conv2d(3, 4, 3, padding="same"),
    "tensorflow-same": Conv2dSame(3, 4, 3, stride=2),
    "standardised": StdConv2d(3, 4, 3, padding=1),
    "standardised-same": StdConv2dSame(3, 4, 3, stride=2),
    "scaled-standardised": ScaledStdConv2d(3, 4, 3, padding=1, gamma=1.7),
    "max": nn.MaxPool2d(3, 2, 1),
    "max-ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max-same": MaxPool2dSame(3, 2),
    "avg": nn.AvgPool2d(3, 2, 1),
    "avg-no-count": nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
    "avg-same": AvgPool2dSame(3, 2),
    "blur": BlurPool2d(3, stride=2),
}


def channels_of(layer):
    return getattr(layer, "in_channels", 3) or 3


@pytest.mark.parametrize("profile", ["mean", "centre"])
@pytest.mark.parametrize("depth", [1, 2, 5, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_rule_equals_its_layer_on_boring_volumes(name, depth, profile):
    layer = LAYERS[name].double().eval()
    net3d = build_alone(layer, profile=profile)
    image = torch.randn(2, channels_of(layer), 17, 19, dtype=torch.float64)
    out = net3d(image.unsqueeze(2).repeat(1, 1, depth, 1, 1))
    expected = layer(image).unsqueeze(2).expand_as(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    step = max(layer.stride) if isinstance(layer.stride, tuple) else layer.stride
    assert out.shape[2] == -(-depth // step)


def build_alone(layer, plan=None, profile="mean"):
    """The layer inflated on its own; a pool gets a 1×1 convolution before it, which `trace` needs."""
    if isinstance(layer, nn.Conv2d):
        return build(layer, plan or KernelPlan.isotropic(), profile=profile)[0]
    identity = nn.Conv2d(3, 3, 1, bias=False).double()
    identity.weight.data = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1)
    return build(nn.Sequential(identity, layer), plan or KernelPlan.isotropic(), profile=profile)[0]


@pytest.mark.parametrize(
    ("layer2d", "layer3d"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), lambda w, b: lambda x: nn.functional.conv3d(padded(x), w, b)),
        (
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            lambda w, b: lambda x: nn.functional.conv3d(padded(x), w, b, groups=4),
        ),
    ],
    ids=["dense", "depthwise"],
)
def test_convolution_is_torch_conv3d(layer2d, layer3d):
    """On any volume, not only boring ones: the folded layer is the 3D convolution of its kernel."""
    net3d = build_alone(layer2d.double())
    net3d.network.weight.data.normal_()
    volume = torch.randn(2, layer2d.in_channels, 6, 7, 8, dtype=torch.float64)
    expected = layer3d(net3d.network.weight, net3d.network.bias)(volume)
    torch.testing.assert_close(net3d(volume), expected)


def padded(x):
    x = nn.functional.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate")
    return nn.functional.pad(x, (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("layer", "reference"),
    [(nn.MaxPool2d(3, 2, 1), nn.MaxPool3d(3, 2, 1)), (nn.AvgPool2d(2), nn.AvgPool3d(2))],
    ids=["max", "avg"],
)
def test_pools_are_torch_3d_pools(layer, reference):
    volume = torch.randn(2, 3, 8, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(build_alone(layer)(volume), reference(volume))


def test_centre_equals_the_2d_layer_on_any_volume():
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    volume = torch.randn(2, 2, 5, 9, 9, dtype=torch.float64)
    slices = torch.stack([layer(volume[:, :, d]) for d in range(5)], dim=2)
    torch.testing.assert_close(build_alone(layer, profile="centre")(volume), slices)


def test_planar_equals_the_2d_network_slice_by_slice():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2)).double()
    volume = torch.randn(2, 1, 5, 16, 16, dtype=torch.float64)
    slices = torch.stack([net(volume[:, :, d]) for d in range(5)], dim=2)
    torch.testing.assert_close(inflate(net, "planar")(volume), slices)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("name", ["conv", "depthwise", "max"])
def test_memory_format_changes_nothing_and_is_kept(name, memory_format):
    layer = copy.deepcopy(LAYERS[name]).float()
    volume = torch.randn(2, channels_of(layer), 6, 8, 8)
    net3d = build_alone(layer).float()
    out = net3d(volume.contiguous(memory_format=memory_format))
    torch.testing.assert_close(out, net3d(volume))
    if memory_format == torch.channels_last_3d:
        assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("q", [1, 3])
def test_splitting_depth_is_undone_by_merging(q):
    x = torch.randn(2 * 5 * q, 4, 3, 3)
    split = split_depth(x, 2, q)
    assert split.shape == (2 * q, 4, 5, 3, 3)
    torch.testing.assert_close(merge_depth(split, 2, q), x)


def test_padding_repeats_the_end_slices_or_adds_zeros():
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1, 1)
    assert pad_depth(x, 2, 1, "replicate").flatten().tolist() == [1, 1, 1, 2, 3, 3]
    assert pad_depth(x, 1, 1, "zeros").flatten().tolist() == [0, 1, 2, 3, 0]
    assert pad_depth(x, 0, -1, "zeros").flatten().tolist() == [1, 2]


def test_every_parameter_learns():
    net3d = build(
        nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, groups=4)), KernelPlan.isotropic()
    )[0]
    net3d(torch.randn(1, 2, 4, 12, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net3d.parameters())


class BrokenConv(ConvRule):
    def kernel(self):
        return self.weight * 1.001


class BrokenMax(MaxPoolRule):
    @staticmethod
    def combine(windows):
        return windows[0] + windows[-1]


class BrokenMean(AvgPoolRule):
    @staticmethod
    def combine(windows):
        return sum(windows)


@pytest.mark.parametrize(
    ("kind", "broken", "path"),
    [
        (nn.Conv2d, BrokenConv, "stem.0"),
        (nn.MaxPool2d, BrokenMax, "stem.2"),
        (nn.AvgPool2d, BrokenMean, "stem.3"),
    ],
    ids=["conv", "max", "mean"],
)
def test_broken_rule_is_refused_with_the_path_of_its_module(monkeypatch, kind, broken, path):
    from medi3d.errors import InexactError
    from medi3d.inflation.rules import base as rules

    net = nn.Sequential()
    net.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2))
    assert inflate(net).report.exactness.exact
    monkeypatch.setitem(rules._RULES, kind, broken)
    with pytest.raises(InexactError, match=f"module '{path}'"):
        inflate(net)


def test_subclass_inherits_the_rule_of_its_base():
    class Mine(nn.Conv2d):
        pass

    assert find_rule(Mine(1, 1, 1)) is ConvRule
    assert find_rule(nn.ReLU()) is None


def test_zero_padding_errs_at_the_ends_alone():
    net = nn.Conv2d(1, 2, 3, padding=1)
    net3d, _ = build(net, replace(KernelPlan.isotropic(), padding="zeros"))
    level = verify(net, net3d, depth=8).levels[0]
    assert level.max_rel_error < 1e-9 < 0.1 < level.border_rel_error


def test_fold_refuses_what_is_not_a_volume():
    from medi3d.errors import ShapeError

    with pytest.raises(ShapeError, match=r"takes \(B, C, D, H, W\)"):
        Fold().fold(torch.zeros(1, 1, 8, 8))


POOLS = {
    **{name: layer for name, layer in LAYERS.items() if name.startswith("max")},
    "max-same-one": MaxPool2dSame(3, 1),
    "max-same-two": MaxPool2dSame(2, 2),
    "max-two": nn.MaxPool2d(2, 2),
    "max-dilated": nn.MaxPool2d(3, 1, padding=1, dilation=2),
}


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("name", POOLS)
def test_a_max_pool_in_one_step_is_its_two_halves_and_so_is_its_gradient(name, depth):
    net3d = build_alone(POOLS[name])
    rule = net3d.network[1]
    volume = torch.randn(2, 3, depth, 16, 19, dtype=torch.float64, requires_grad=True)
    whole = net3d(volume)
    with torch.no_grad():
        assert torch.equal(whole, net3d(volume))
    with net3d.fold.folded(volume) as slices:
        halves = net3d.fold.unfold(PoolRule.forward(rule, slices))
    assert torch.equal(whole, halves)
    gradient = torch.randn_like(whole)
    expected = torch.autograd.grad(halves, volume, gradient)
    torch.testing.assert_close(torch.autograd.grad(whole, volume, gradient), expected)


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if isinstance(layer, nn.Conv2d)])
@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_channels_last_memory_changes_no_convolution(name, padding):
    net3d = build_alone(LAYERS[name], KernelPlan(name="test", padding=padding)).float()
    volume = torch.randn(1, channels_of(LAYERS[name]), 5, 17, 18)
    expected = net3d(volume)
    found = net3d(volume.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), net3d.parameters()) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
