"""Statistics over the volume or per slice: both exact; over the volume they are those of all its voxels."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import CecaModule, EcaModule, EffectiveSEModule, GatherExcite, GlobalContext, GroupNorm1
from timm.layers.cbam import ChannelAttn
from timm.layers.grn import GlobalResponseNorm
from timm.layers.selective_kernel import SelectiveKernel
from timm.layers.split_attn import SplitAttn
from timm.layers.squeeze_excite import SEModule, SqueezeExciteCl
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.focalnet import FocalModulation
from timm.models.hgnet import EseModule
from timm.models.senet import SEModule as SENetModule
from torch import nn
from torchvision.ops import SqueezeExcitation

from medi3d.errors import InexactError, PlanError
from medi3d.inflation import KernelPlan, inflate, verify
from medi3d.inflation.network import build
from medi3d.inflation.plan import Override
from medi3d.inflation.rules import statistics

SLICES = KernelPlan("slice-wise", kernel=1, stride=1)  # nothing but statistics joins slices
VOLUME = replace(SLICES, statistics="volume")


class Last(nn.Module):
    """A layer that has channels last."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


TALL = {
    "se": lambda: SEModule(8, rd_channels=4),
    "se with maxima": lambda: SEModule(8, rd_channels=4, add_maxpool=True),
    "effective se": lambda: EffectiveSEModule(8),
    "efficientnet's se": lambda: SqueezeExcite(8, rd_channels=4),
    "senet's se": lambda: SENetModule(8, 2),
    "hgnet's se": lambda: EseModule(8),
    "torchvision's se": lambda: SqueezeExcitation(8, 4),
    "se, channels last": lambda: Last(SqueezeExciteCl(8, rd_channels=4)),
    "eca": lambda: EcaModule(8),
    "circular eca": lambda: CecaModule(8),
    "cbam": lambda: ChannelAttn(8, rd_channels=4),
    "gather-excite": lambda: GatherExcite(8, use_mlp=False),
    "global context": lambda: GlobalContext(8, rd_channels=4, fuse_add=True),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "one group": lambda: GroupNorm1(8),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
}
"""Layers that see no neighbourhood: the volume as one tall slice tells what they must give."""

OTHERS = {
    "grn": lambda: GlobalResponseNorm(8, channels_last=False),
    "grn, channels last": lambda: Last(GlobalResponseNorm(8)),
    "selective kernel": lambda: SelectiveKernel(8, 8, rd_channels=4),
    "split attention": lambda: SplitAttn(8, 8, padding=1),
    "focal modulation": lambda: FocalModulation(8, 3, 1),
    "layer norm over space": lambda: nn.LayerNorm((8, 16, 16)),
    "layer norm without weights": lambda: nn.LayerNorm((16, 16), elementwise_affine=False),
}


def network(make):
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), make(), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize("make", [*TALL.values(), *OTHERS.values()], ids=[*TALL, *OTHERS])
def test_both_reaches_are_exact_and_only_one_mixes(make):
    net = network(make)
    for plan, mixes in ((SLICES, False), (VOLUME, True)):
        net3d = inflate(net, plan)
        assert net3d.report.exactness.mixes_depth is mixes
        assert net3d.report.exact_on == ("boring" if mixes else "any")
        for depth in (1, 8, 64):
            assert verify(net, net3d, depth=depth).max_rel_error <= 1e-9


@pytest.mark.parametrize("make", TALL.values(), ids=TALL)
def test_statistics_are_those_of_the_volume_as_one_tall_slice(make):
    net = nn.Sequential(nn.Conv2d(8, 8, 1), make()).double().eval()
    for parameter in net[1].parameters():
        nn.init.normal_(parameter)
    net3d, _ = build(net, VOLUME)
    volume = torch.randn(2, 8, 5, 6, 7, dtype=torch.float64)
    tall = net(volume.flatten(2, 3)).view_as(volume)
    torch.testing.assert_close(net3d(volume), tall)
    by_slice = torch.stack([net(volume[:, :, d]) for d in range(5)], dim=2)
    torch.testing.assert_close(build(net, SLICES)[0](volume), by_slice)


def test_layer_norm_over_space_keeps_a_weight_for_each_position():
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.LayerNorm((2, 64, 64))).double()
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    net3d, _ = build(net, VOLUME)
    volume = torch.randn(1, 2, 5, 64, 64, dtype=torch.float64)
    with net3d.fold.folded(volume) as slices:
        out = net3d.fold.unfold(net3d.network[1](slices))
    normed = nn.functional.layer_norm(volume, volume.shape[1:])
    torch.testing.assert_close(out, normed * net[1].weight.unsqueeze(1) + net[1].bias.unsqueeze(1))


def test_response_norm_is_that_of_the_volume_by_root_mean_square():
    """A norm over D slices grows with √D, and the layer's epsilon would not: so it is a mean."""
    layer = GlobalResponseNorm(4, channels_last=False).double()
    nn.init.normal_(layer.weight)
    layer.eps = 0.5
    net3d, _ = build(nn.Sequential(nn.Conv2d(4, 4, 1), layer), VOLUME)
    volume = torch.randn(1, 4, 5, 6, 7, dtype=torch.float64)
    with net3d.fold.folded(volume) as slices:
        out = net3d.fold.unfold(net3d.network[1](slices))
    rms = volume.square().sum(dim=(2, 3, 4), keepdim=True).sqrt() / 5**0.5
    ratio = rms / (rms.mean(dim=1, keepdim=True) + 0.5)
    torch.testing.assert_close(out, volume + layer.weight.view(-1, 1, 1, 1) * volume * ratio)


def summed(means):
    return means.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("make", "target", "name", "broken"),
    [
        (TALL["se"], statistics._JOIN, "mean", summed),
        (TALL["se with maxima"], statistics._JOIN, "amax", summed),
        (TALL["torchvision's se"], statistics._JOIN, "adaptive_avg_pool2d", summed),
        (OTHERS["grn"], statistics._JOIN, "norm", lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True)),
        (TALL["group norm"], statistics, "merge_depth", lambda x, *_: x.flatten(0, 1).view(-1, 8, 16, 16)),
        (OTHERS["layer norm over space"], torch, "rsqrt", torch.reciprocal),
    ],
    ids=["mean", "maximum", "pool", "norm", "one slice", "layer norm"],
)
def test_broken_statistics_are_refused(monkeypatch, make, target, name, broken):
    if isinstance(target, dict):
        monkeypatch.setitem(target, name, broken)
    else:
        monkeypatch.setattr(target, name, broken)
    with pytest.raises(InexactError):
        inflate(network(make), VOLUME)


def test_one_layer_may_differ_by_override():
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), SEModule(8, rd_channels=4), nn.GroupNorm(2, 8))
    plan = replace(SLICES, overrides=(Override("1", statistics="volume"),))
    report = inflate(net, plan).report
    assert [layer.rule for layer in report.layers if layer.name in ("1", "2")] == ["SqueezeRule"]
    assert report.exactness.mixes_depth


def test_gather_excite_over_a_neighbourhood_is_left_alone():
    report = inflate(network(lambda: GatherExcite(8, extent=2, use_mlp=False)), VOLUME).report
    assert not report.exactness.mixes_depth


def test_statistics_do_not_count_as_receptive_field():
    plan = replace(VOLUME, kernel=3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), SplitAttn(8, 8, padding=1))
    assert inflate(net, plan).levels[0].reach == (5, 5, 5)


def test_unknown_statistics_are_refused():
    with pytest.raises(PlanError, match="statistics is 'batch'; use one of slice, volume"):
        KernelPlan("mine", statistics="batch")


@pytest.mark.slow
@pytest.mark.parametrize("reach", ["slice", "volume"])
@pytest.mark.parametrize(
    "name", ["seresnet18", "efficientnet_b0", "resnet50_gn", "convnextv2_atto", "gcresnet33ts", "resnest14d"]
)
def test_published_networks_are_exact_at_every_slice(name, reach):
    net = timm.create_model(name, features_only=True, out_indices=(0, 1, 2))
    net3d = inflate(net, replace(KernelPlan.isotropic(), statistics=reach), in_channels=1)
    for depth in (8, 64):
        assert verify(net, net3d, depth=depth, size=32).max_rel_error <= 1e-9
