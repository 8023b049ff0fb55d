"""Whole networks: exact at every level, at shallow and deep volumes, and refused where they are not."""

import pytest
import timm
import torch
from torch import nn

from medi3d.errors import InexactError, PlanError, ShapeError, SourceError
from medi3d.inflation import KernelPlan, inflate, verify
from medi3d.inflation.plan import Override
from medi3d.inflation.rules import Rule

FAMILIES = {
    "resnet": "resnet18",
    "efficientnet": "efficientnet_b0",
    "efficientnet-lite": "tf_efficientnet_lite0",
    "convnext": "convnext_atto",
    "convnext-grn": "convnextv2_atto",
    "densenet": "densenet121",
    "vgg": "vgg11_bn",
    "regnet-se": "regnety_002",
    "mobilenetv3": "mobilenetv3_small_050",
    "nfnet": "nfnet_l0",
    "blur": "resnetblur18",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_family_is_exact_at_every_level_shallow_and_deep(name):
    net = timm.create_model(name, features_only=True)
    net3d = inflate(net, "isotropic", in_channels=1)
    assert net3d.report.exactness.mixes_depth
    for depth in (8, 64):
        report = verify(net, net3d, depth=depth, size=32)
        assert report.max_rel_error <= 1e-9
    assert [s[0] for s in net3d.strides] == [s[1] for s in net3d.strides]


class Branches(nn.Module):
    """A residual network whose branch starts at zero, with squeeze-excitation: what hides mistakes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.short = nn.Conv2d(8, 8, 1, 2)
        nn.init.zeros_(self.branch[1].weight)

    def forward(self, x):
        x = self.stem(x)
        y = self.branch(x)
        return [x, self.short(x) + y * y.mean((2, 3), keepdim=True).sigmoid()]


def test_zero_initialised_branch_is_proven_too():
    net3d = inflate(Branches())
    net3d.network.branch[0].weight.data *= 1.01  # nothing shows while the branch is multiplied by zero
    report = verify(collapsed(net3d), net3d)
    assert report.max_rel_error > 1e-4
    assert "branch.0" in report.failure


def collapsed(net3d):
    net = Branches()
    state = {
        k: v.double().sum(2).float() if v.dim() == 5 else v for k, v in net3d.network.state_dict().items()
    }
    state["branch.0.weight"] = state["branch.0.weight"] / 1.01
    net.load_state_dict(state)
    return net


def test_given_network_is_not_changed():
    net = Branches()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    inflate(net, in_channels=1)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert isinstance(net.stem, nn.Conv2d)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels(channels):
    net3d = inflate(Branches(), in_channels=channels)
    assert net3d(torch.randn(1, channels, 5, 20, 21))[1].shape == (1, 8, 2, 5, 6)


def test_levels_are_what_runs():
    net3d = inflate(Branches())
    maps = net3d(torch.randn(2, 3, 16, 32, 32))
    assert [m.shape[1] for m in maps] == net3d.out_channels == [8, 8]
    assert [tuple(16 * 2 // s // 2 for s in stride) for stride in net3d.strides] == [(8, 8, 8), (4, 4, 4)]
    assert net3d.levels[1].reach == (7, 7, 7)


class Lagging(nn.Module):
    """A step that no rule sees: depth of the two branches differs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, 2, 1)

    def forward(self, x):
        return self.conv(x) + x[:, :, ::2, ::2]


class MixesBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x):
        return self.conv(x) - x.mean(0, keepdim=True)


@pytest.mark.parametrize("net", [Lagging(), MixesBatch()], ids=["sliced", "mixed batch"])
def test_what_cannot_be_exact_is_refused(net):
    with pytest.raises(InexactError, match="cannot be inflated exactly"):
        inflate(net)
    report = inflate(net, allow_inexact=True).report
    assert not report.exactness.exact


def test_repeat_is_built_and_said_to_be_inexact():
    report = inflate(Branches(), profile="repeat").report
    assert not report.exact_by_nature
    assert report.max_rel_error > 0.1


@pytest.mark.parametrize(
    ("plan", "mixes"), [("isotropic", True), ("planar", False)], ids=["isotropic", "planar"]
)
def test_report_says_whether_slices_mix(plan, mixes):
    assert inflate(Branches(), plan).report.exactness.mixes_depth is mixes


def test_looking_forward_only_is_mixing_too():
    net = nn.Conv2d(1, 1, 2, 1)
    assert inflate(net).report.exactness.mixes_depth


def test_refusals():
    with pytest.raises(SourceError, match="has no 2D convolution"):
        inflate(nn.Linear(3, 3))
    with pytest.raises(SourceError, match=r"takes no \(2, 3, S, S\) image"):
        inflate(nn.Sequential(nn.Flatten(), nn.Linear(7, 7), nn.Conv2d(3, 3, 1)))
    with pytest.raises(PlanError, match=r"overrides .stm\.\*., but no layer has that name; layers are stem"):
        inflate(Branches(), KernelPlan("mine", overrides=(Override("stm.*", kernel=1),)))
    with pytest.raises(PlanError, match="unknown depth profile"):
        inflate(Branches(), profile="sum")
    with pytest.raises(ShapeError, match="at least 1 input channel, not 0"):
        inflate(Branches(), in_channels=0)
    with pytest.raises(ShapeError, match="takes 3 channel"):
        inflate(Branches())(torch.zeros(1, 1, 4, 8, 8))
    with pytest.raises(ShapeError, match=r"takes \(B, C, D, H, W\)"):
        inflate(Branches())(torch.zeros(1, 3, 8, 8))


def test_a_layer_used_in_several_places_is_replaced_in_all_of_them():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    net3d = inflate(nn.Sequential(conv, nn.ReLU(), conv, nn.Sequential(conv)))
    assert net3d.network[0] is net3d.network[2] is net3d.network[3][0]
    assert isinstance(net3d.network[0], Rule)
