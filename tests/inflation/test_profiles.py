"""Profiles: on which volumes each equals the 2D layer, and that what it says of itself is measured."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn

from medi3d.errors import InexactError, ShapeError
from medi3d.inflation import KernelPlan, inflate, kernels
from medi3d.inflation.fold import Fold
from medi3d.inflation.kernels import PROFILES
from medi3d.inflation.network import build, prove
from medi3d.inflation.plan import LayerGeometry, Override
from medi3d.inflation.rules import TubeletRule
from medi3d.models.artifact import load_artifact, save_artifact
from medi3d.models.encoders import create_encoder

LAYERS = {
    "dense": nn.Conv2d(6, 8, 3, padding=1),
    "five": nn.Conv2d(6, 7, 5, padding=2, bias=False),
    "grouped": nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "multiplied": nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "dilated": nn.Conv2d(6, 8, 3, padding=2, dilation=2),
    "mirrored": nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "standardised": StdConv2d(6, 8, 3, padding=1),
    "scaled": ScaledStdConv2d(6, 8, 3, padding=1, gamma=1.7),
}
STRIDED = {
    "strided": nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "same": Conv2dSame(6, 8, 3, stride=2),
    "patches": nn.Conv2d(6, 8, 2, stride=2),
    "depthwise-strided": nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6),
}


def each(layers):
    return pytest.mark.parametrize("layer", [x.double() for x in layers.values()], ids=layers)


@pytest.mark.parametrize("profile", [name for name, volumes in PROFILES.items() if volumes == "any"])
@each(LAYERS)
def test_exact_on_any_volume_at_every_slice(layer, profile):
    net3d, _ = build(layer, KernelPlan.isotropic(), profile=profile)
    assert net3d.network.exact_on == "any"
    volume = torch.randn(2, 6, 5, 12, 13, dtype=torch.float64)
    slices = torch.stack([layer(volume[:, :, d]) for d in range(5)], dim=2)
    torch.testing.assert_close(net3d(volume), slices, rtol=0, atol=1e-12)


@pytest.mark.parametrize("profile", PROFILES)
@each({**LAYERS, **STRIDED})
def test_what_a_profile_says_of_itself_is_what_is_measured(layer, profile):
    net3d, _ = build(layer, KernelPlan.isotropic(), profile=profile)
    report = prove(layer, net3d)
    assert report.exactness.exact == (report.exact_on != "never")
    assert report.exactness.mixes_depth or report.exact_on == "any" or layer.stride != (1, 1)
    assert report.exact_on == ("boring" if layer.stride != (1, 1) and profile in ANY else PROFILES[profile])


ANY = [name for name, volumes in PROFILES.items() if volumes == "any"]


@pytest.mark.parametrize("profile", PROFILES)
def test_one_tap_along_depth_changes_nothing(profile):
    layer = nn.Conv2d(3, 5, 3, padding=1)
    net3d, _ = build(layer, KernelPlan.planar(), profile=profile)
    assert list(net3d.network.state_dict()) == ["weight", "bias"]
    assert torch.equal(net3d.network.weight[:, :, 0], layer.weight)
    assert net3d.network.exact_on == "any"


@each({"dense": LAYERS["dense"], "grouped": LAYERS["grouped"], "strided": STRIDED["strided"]})
def test_factorised_is_two_convolutions_also_when_trained(layer):
    net3d, _ = build(layer, replace(KernelPlan.isotropic(), padding="zeros"), profile="factorised")
    conv = net3d.network
    assert list(conv.state_dict()) == ["weight", "bias", "along_depth.weight"]
    conv.along_depth.weight.data.normal_()
    volume = torch.randn(2, 6, 6, 8, 8, dtype=torch.float64)
    step, groups = conv.depth.stride, layer.groups
    spatial = nn.functional.conv3d(
        volume, conv.weight, conv.bias, (1, *layer.stride), (0, *layer.padding), 1, groups
    )
    expected = nn.functional.conv3d(
        spatial, conv.along_depth.weight, stride=(step, 1, 1), padding=(1, 0, 0), groups=groups
    )
    torch.testing.assert_close(net3d(volume), expected)


@each({**LAYERS, **STRIDED})
def test_factorised_equals_its_flat_state_on_boring_volumes_when_trained(layer):
    net3d, _ = build(layer, KernelPlan.isotropic(), profile="factorised")
    net3d.network.along_depth.weight.data.normal_()
    if isinstance(layer, (StdConv2d, ScaledStdConv2d)):
        with pytest.raises(InexactError, match="standardised convolution equals no 2D layer"):
            net3d.network.flat_state()
        return
    flat = build(layer, KernelPlan.planar())[0]
    flat.network.load_state_dict(
        {k: v.unsqueeze(2) if v.dim() == 4 else v for k, v in net3d.network.flat_state().items()}
    )
    image = torch.randn(2, 6, 1, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(net3d(image.repeat(1, 1, 4, 1, 1))[:, :, :1], flat(image))


def test_acs_is_the_authors_three_convolutions():
    """ACSConv, `acsconv/operators`: kernel.unsqueeze(2), (3), (4), each padded in its own plane."""
    layer = nn.Conv2d(3, 8, 3, padding=1, bias=False).double()
    net3d, _ = build(layer, replace(KernelPlan.isotropic(), padding="zeros"), profile="acs")
    volume, parts = torch.randn(2, 3, 6, 7, 8, dtype=torch.float64), []
    for group, axis in ((layer.weight[:3], 2), (layer.weight[3:6], 3), (layer.weight[6:], 4)):
        padding = [1, 1, 1]
        padding[axis - 2] = 0
        parts.append(nn.functional.conv3d(volume, group.unsqueeze(axis), padding=padding))
    torch.testing.assert_close(net3d(volume), torch.cat(parts, dim=1))


def test_acs_kernels_stay_in_their_planes_when_trained():
    net3d, _ = build(nn.Conv2d(3, 6, 3, padding=1), KernelPlan.isotropic(), profile="acs")
    assert sum(p.numel() for p in net3d.parameters()) == 6 * 3 * 9 + 6
    net3d(torch.randn(1, 3, 4, 6, 6)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net3d.parameters())
    assert net3d.network.kernel().count_nonzero() == 6 * 3 * 9


def test_acs_refuses_what_has_no_planes_with_the_path_of_the_layer():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, (1, 7)))
    with pytest.raises(ShapeError, match=r"layer '1': profile acs needs k×k kernels .* not \(1, 7\)"):
        inflate(net, profile="acs")
    with pytest.raises(ShapeError, match=r"layer '': .* 5 taps"):
        inflate(net[0], KernelPlan("wide", overrides=(Override("*", kernel=5),)), profile="acs")
    with pytest.raises(ShapeError, match="k×k kernels"):
        kernels.place_in_planes(torch.zeros(3, 1, 1, 7))


@pytest.mark.parametrize("profile", ["factorised", "acs"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "nfnet_l0"])
def test_whole_networks(name, profile):
    report = inflate(
        timm.create_model(name, features_only=True, out_indices=(0, 1, 2)), profile=profile
    ).report
    assert report.exactness.exact == (profile == "factorised")
    assert report.exact_on == ("boring" if profile == "factorised" else "never")


def test_tubelets_are_factorised_like_any_patch():
    """The slices of a tubelet are channels; folded in front or not, it is one layer."""
    layer = nn.Conv2d(3, 4, 2, stride=2).double()
    depth = KernelPlan.isotropic().layer(LayerGeometry("", "conv", (2, 2), (2, 2)))
    fold = Fold()
    tubelet = TubeletRule(layer, depth, fold, "factorised")
    plain = build(layer, KernelPlan.isotropic(), profile="factorised")[0]
    tubelet.along_depth.weight.data = plain.network.along_depth.weight.data.normal_()
    volume = torch.randn(2, 3, 6, 8, 8, dtype=torch.float64)
    with fold.folded(volume) as slices:
        torch.testing.assert_close(fold.unfold(tubelet(slices)), plain(volume))


@pytest.mark.parametrize("profile", PROFILES)
def test_artifact_keeps_its_profile(tmp_path, profile):
    encoder = create_encoder("timm:resnet18", profile=profile, levels=2)
    loaded = load_artifact(save_artifact(encoder, tmp_path / "encoder.safetensors"))
    volume = torch.randn(1, 1, 4, 32, 32)
    torch.testing.assert_close(loaded.eval()(volume)[1], encoder.eval()(volume)[1])
    assert loaded.report.exact_on == encoder.report.exact_on
