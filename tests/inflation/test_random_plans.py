"""Random small networks under random plans: inflated exactly, or refused by an error of medi3d's."""

from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BlurPool2d, SEModule, SpaceToDepth
from torch import nn

from medi3d.errors import Medi3dError
from medi3d.inflation import KernelPlan, inflate
from medi3d.inflation.plan import Override

TOLERANCE = 1e-9
PACED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.Upsample)
CHANNELS = 4
SIZE = 64  # the smallest that `trace` tries


class Residual(nn.Module):
    """A branch beside a shortcut; whether they meet is up to the plan."""

    def __init__(self, branch, shortcut):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x):
        return self.branch(x) + self.shortcut(x)


class Squeeze(nn.Module):
    """Squeeze-excitation as a line of code, which no rule sees."""

    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Half(nn.Module):
    """A resampling called as a function, which no rule sees either."""

    def forward(self, x):
        return F.interpolate(x, scale_factor=0.5, mode="bilinear")


@st.composite
def convolutions(draw, stride=None, same=False):
    kernel = draw(st.sampled_from([1, 3, 3, 5] if same else [1, 2, 3, 4, 5]))
    dilation = draw(st.sampled_from([1, 1, 2]))
    stride = draw(st.sampled_from([1, 1, 2, 3])) if stride is None else stride
    padding = dilation * (kernel // 2) if same else draw(st.integers(0, kernel // 2))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect"]))
    groups = draw(st.sampled_from([1, 1, 2, CHANNELS]))
    return nn.Conv2d(
        CHANNELS, CHANNELS, kernel, stride, padding, dilation, groups, draw(st.booleans()), padding_mode=mode
    )


@st.composite
def pools(draw, stride=None, same=False):
    kernel = 3 if same else draw(st.sampled_from([1, 2, 3]))
    stride = draw(st.sampled_from([1, 2, 3])) if stride is None else stride
    padding = kernel // 2 if same else draw(st.integers(0, kernel // 2))
    ceil = False if same else draw(st.booleans())
    if draw(st.booleans()):
        return nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    return nn.AvgPool2d(kernel, stride, padding, ceil, draw(st.booleans()))


@st.composite
def residuals(draw):
    stride = draw(st.sampled_from([1, 2]))
    branch = [draw(convolutions(stride, same=True)), nn.ReLU(), *draw(st.lists(norms(), max_size=1))]
    shortcuts = [convolutions(stride, same=True), pools(stride, same=True)]
    shortcut = nn.Identity() if stride == 1 and draw(st.booleans()) else draw(st.one_of(shortcuts))
    return Residual(nn.Sequential(*branch), shortcut)


@st.composite
def resamplings(draw):
    if draw(st.booleans()):
        return nn.Upsample(scale_factor=2, mode=draw(st.sampled_from(["nearest", "bilinear"])))
    merging = nn.Sequential(SpaceToDepth(4), nn.Conv2d(16 * CHANNELS, CHANNELS, 1))
    return draw(st.sampled_from([BlurPool2d(CHANNELS, stride=2), merging, Half()]))


@st.composite
def norms(draw):
    kinds = (nn.BatchNorm2d(CHANNELS), nn.GroupNorm(2, CHANNELS), nn.InstanceNorm2d(CHANNELS, affine=True))
    return draw(st.sampled_from(kinds))


@st.composite
def squeezes(draw):
    return draw(st.sampled_from([SEModule(CHANNELS, rd_channels=2, add_maxpool=True), Squeeze()]))


@st.composite
def networks(draw):
    """A stem, then one to four blocks; every parameter at random, so that nothing hides."""
    stem = nn.Conv2d(3, CHANNELS, draw(st.sampled_from([3, 4])), draw(st.sampled_from([1, 2, 4])), 1)
    block = st.one_of(convolutions(), pools(), residuals(), resamplings(), norms(), squeezes())
    network = nn.Sequential(stem, *draw(st.lists(block, min_size=1, max_size=4))).double().eval()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for parameter in network.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return network


@st.composite
def plans(draw, network):
    """Any plan, and for some layers another kernel, stride or padding; one in many names no layer."""
    plain = st.builds(
        KernelPlan,
        st.just("random"),
        kernel=st.sampled_from(["in-plane", 1, 2, 3]),
        stride=st.sampled_from(["in-plane", "in-plane", 1, 2]),
        padding=st.sampled_from(["replicate", "replicate", "zeros"]),
        held_max_pools=st.integers(0, 1),
    )
    spaced = st.sampled_from([KernelPlan.from_spacing((5, 1, 1)), KernelPlan.from_fps(12.5)])
    plan = draw(st.one_of(plain, plain, spaced))
    names = [name for name, layer in network.named_modules() if isinstance(layer, PACED)]
    override = st.builds(
        Override,
        st.sampled_from([*names, *names, *names, "*", "nothing"]),
        kernel=st.sampled_from([None, 1, 2, 3, 5]),
        stride=st.sampled_from([None, None, 1, 2, 3]),
        padding=st.sampled_from([None, None, "replicate", "zeros", "valid"]),
    )
    overrides = tuple(draw(st.lists(override, max_size=3)))
    return replace(plan, overrides=overrides, statistics=draw(st.sampled_from(["slice", "volume"])))


def outcome(data):
    """Inflate a random network under a random plan; where that is done, hold it to the law of inflation."""
    network = data.draw(networks())
    plan = data.draw(plans(network))
    try:
        net3d = inflate(
            network, plan, profile=data.draw(st.sampled_from(["mean", "mean", "centre", "factorised"]))
        )
    except Medi3dError:
        return "refused"
    for rule in net3d.rules().values():  # the law is for slices that go on: zeros differ at both ends
        if rule.depth.padding == "zeros":
            rule.depth = replace(rule.depth, padding="replicate")
    size = max(SIZE, net3d.report.exactness.size)  # what the 2D network can take
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = network(images).unsqueeze(2)
    proven = net3d.report.exactness.depth
    for depth in (proven, proven + data.draw(st.integers(1, 9))):
        out = net3d(images.unsqueeze(2).repeat(1, 1, depth, 1, 1))
        error = (out - expected).abs().amax() / expected.abs().amax()
        assert float(error) <= TOLERANCE
    return "exact"


@torch.no_grad()
def test_random_plans_end_exact_or_refused():
    outcomes = Counter()

    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def check(data):
        outcomes[outcome(data)] += 1

    check()
    assert outcomes["exact"] > outcomes["refused"] > 0
