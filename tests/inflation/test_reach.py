"""Receptive fields and strides: as published, as measured with NaN, and as what really runs."""

import pytest
import timm
import torch
from torch import nn

from medi3d.inflation.network import build, inflate
from medi3d.inflation.plan import KernelPlan
from medi3d.models.inception import InceptionV1
from medi3d.models.sources import build_source

PLANS = {
    "isotropic": KernelPlan.isotropic(),
    "planar": KernelPlan.planar(),
    "video": KernelPlan.video(),
    "thick slices": KernelPlan.from_spacing((5, 1, 1)),
}


def test_resnet18_has_its_known_receptive_fields():
    levels = build(timm.create_model("resnet18", features_only=True), KernelPlan.isotropic())[0].levels
    assert [level.stride for level in levels] == [(s, s, s) for s in (2, 4, 8, 16, 32)]
    assert [level.reach for level in levels] == [(r, r, r) for r in (7, 43, 99, 211, 435)]


def test_i3d_has_the_receptive_fields_of_its_paper():
    """Carreira & Zisserman 2017, figure 3: (time, height, width) after each of the first three max-pools."""
    pools = ("MaxPool3d_2a_3x3", "MaxPool3d_3a_3x3", "MaxPool3d_4a_3x3")
    levels = build(InceptionV1(pools), KernelPlan.video())[0].levels
    assert [level.reach for level in levels] == [(7, 11, 11), (11, 27, 27), (23, 75, 75)]


class Pooled(nn.Module):
    """Strides by convolution and pool, a dilated convolution, two maps."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, 2, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.wide = nn.Conv2d(2, 2, 3, padding=2, dilation=2)

    def forward(self, x):
        x = self.stem(x)
        return [x, self.wide(self.pool(x))]


class Joined(nn.Module):
    """A long branch and a short one that join: the longer counts."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 5, 2, 2))
        self.short = nn.Conv2d(1, 2, 1, 2)

    def forward(self, x):
        return [torch.relu(self.branch(x)) + self.short(x)]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("net", [Pooled(), Joined()], ids=["pooled", "joined"])
def test_reach_and_stride_are_those_measured(net, plan):
    net3d = build(net, plan)[0].eval()
    for axis in range(3):
        measured = measure(net3d, axis)
        assert measured == [(level.reach[axis], level.stride[axis]) for level in net3d.levels]


@torch.no_grad()
def measure(net3d, axis, size=40):
    """Let one slice after another be NaN; see which slices spoil a middle position, and its neighbour."""
    shape = [8, 8, 8]
    shape[axis] = size
    volumes = torch.zeros(size, 1, *shape)
    for index in range(size):
        volumes[index, 0].select(axis, index).fill_(float("nan"))
    found = []
    for output in net3d(volumes):
        spoilt = output.isnan().movedim(2 + axis, 1).flatten(2).any(dim=2)  # (slice of the input, position)
        middle = spoilt.shape[1] // 2
        seen, beside = (spoilt[:, position].nonzero().flatten() for position in (middle, middle + 1))
        found.append((int(seen[-1] - seen[0]) + 1, int(beside[0] - seen[0])))
    return found


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "source", ["timm:test_resnet", "timm:test_convnext", "timm:test_efficientnet", "timm:test_byobnet"]
)
@torch.no_grad()
def test_strides_are_what_runs(source, plan):
    net3d = build(build_source(source, levels=3), plan, in_channels=1)[0].eval()
    size = (16, 32, 48)
    maps = net3d(torch.zeros(1, 1, *size))
    assert [tuple(x.shape[2:]) for x in maps] == [
        tuple(s // step for s, step in zip(size, stride, strict=True)) for stride in net3d.strides
    ]
    assert [x.shape[1] for x in maps] == net3d.out_channels


def test_statistics_over_the_slice_are_not_counted():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            x = self.conv(x)
            return [x * x.mean((2, 3), keepdim=True).sigmoid()]

    assert build(Gated(), KernelPlan.isotropic())[0].levels[0].reach == (3, 3, 3)


def test_steps_that_no_rule_saw_are_told_by_the_size_of_the_map():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(x)[:, :, ::2, ::2]

    assert inflate(Functional()).strides == [(1, 2, 2)]
