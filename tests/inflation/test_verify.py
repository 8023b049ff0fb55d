"""The proof works on networks that medi3d did not make, and nothing that differs hides from it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medi3d.errors import ResourceError, ShapeError
from medi3d.inflation import inflate_kernel, verify


class Flat(nn.Module):
    """A residual network whose branch is multiplied by zero, with everything that a twin may get wrong."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4))
        self.gamma = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return [x, x + self.gamma * self.branch(x)]


class RepeatedEnds(nn.Conv3d):
    """A 3×3×3 convolution whose depth is padded by the end slices."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"))


class PerSlice(nn.GroupNorm):
    """Statistics of each slice, as the 2D network has them."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class Deep(nn.Module):
    """The twin of `Flat` by hand: plain torch layers, the same names, no rule of medi3d."""

    def __init__(self, flat):
        super().__init__()
        self.stem = RepeatedEnds(3, 4, 3, 2, (0, 1, 1))
        self.norm = nn.BatchNorm3d(4)
        self.branch = nn.Sequential(RepeatedEnds(4, 4, 3, 1, (0, 1, 1), bias=False), PerSlice(2, 4))
        self.gamma = nn.Parameter(torch.zeros(4, 1, 1))
        state = flat.state_dict()
        ours = self.state_dict()
        self.load_state_dict(
            {k: inflate_kernel(v, 3) if ours[k].dim() > v.dim() else v for k, v in state.items()}
        )

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return [x, x + self.gamma.unsqueeze(1) * self.branch(x)]


TENSORS = [name for name in Flat().state_dict() if not name.endswith("num_batches_tracked")]


@pytest.fixture
def pair():
    flat = Flat().eval()
    return flat, Deep(flat).eval()


def test_a_twin_by_hand_is_proven(pair):
    report = verify(*pair)
    assert report.exact
    assert report.max_rel_error < 1e-12
    assert report.mixes_depth
    assert [level.channels for level in report.levels] == [4, 4]
    assert [level.stride for level in report.levels] == [(2, 2, 2), (2, 2, 2)]
    assert 0 < report.forward_seconds < report.seconds


@pytest.mark.parametrize("name", TENSORS)
def test_a_change_anywhere_is_caught_though_the_branch_is_multiplied_by_zero(pair, name):
    flat, deep = pair
    deep.state_dict()[name].flatten()[0].add_(1e-3)
    report = verify(flat, deep)
    assert not report.exact
    assert report.max_rel_error > 1e-6
    module = name.rpartition(".")[0]
    assert f"module '{module}'" in report.failure if module else report.failure == ""


def test_one_tap_alone_is_caught_at_the_ends_and_inside(pair):
    flat, deep = pair
    deep.stem.weight.data[:, :, 0] *= 1.5
    assert verify(flat, deep).levels[0].max_rel_error > 1e-3
    deep.stem.weight.data[:, :, 0] /= 1.5


def test_taps_that_sum_to_the_same_are_exact_too(pair):
    flat, deep = pair
    deep.double()
    shift = 0.2 * torch.randn_like(deep.stem.weight[:, :, 0])
    deep.stem.weight.data[:, :, 0] += shift
    deep.stem.weight.data[:, :, 2] -= shift
    assert verify(flat.double(), deep).max_rel_error < 1e-6  # the float32 kernel's own rounding is in it


class Turned(nn.Module):
    """Takes (B, C, H, W, D) for (B, C, D, H, W)."""

    def __init__(self, deep):
        super().__init__()
        self.deep = deep

    def forward(self, x):
        return [y.permute(0, 1, 3, 4, 2) for y in self.deep(x.permute(0, 1, 4, 2, 3))]


def test_another_order_of_axes_is_not_exact(pair):
    flat, deep = pair
    try:
        report = verify(flat, Turned(deep))
    except ShapeError:
        return
    assert not report.exact


class SliceBySlice(nn.Module):
    def __init__(self, flat):
        super().__init__()
        self.inner = flat

    def forward(self, x):
        slices = [self.inner(x[:, :, d]) for d in range(x.shape[2])]
        return [torch.stack(level, dim=2) for level in zip(*slices, strict=True)]


def test_slices_that_do_not_mix_are_told(pair):
    assert not verify(pair[0], SliceBySlice(pair[0])).mixes_depth


@pytest.mark.parametrize("side", [-1, 1], ids=["before", "after"])
def test_mixing_on_one_side_only_is_told(side):
    class Neighbour(nn.Conv3d):
        def forward(self, x):
            return super().forward(x.roll(side, 2) / 2 + x / 2)

    flat, deep = nn.Conv2d(1, 2, 1), Neighbour(1, 2, 1)
    deep.load_state_dict({"weight": flat.weight.detach().unsqueeze(2), "bias": flat.bias.detach()})
    report = verify(flat, deep)
    assert report.exact
    assert report.mixes_depth


def test_another_number_of_levels_is_refused(pair):
    flat, deep = pair

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = deep

        def forward(self, x):
            return self.deep(x)[:1]

    with pytest.raises(ShapeError, match="2D network returns 2 levels, the 3D network 1"):
        verify(flat, First())


def test_a_network_that_cannot_run_is_not_proven(pair):
    flat, deep = pair
    deep.branch[0] = nn.Conv3d(5, 4, 3)
    report = verify(flat, deep)
    assert not report.exact
    assert report.max_rel_error == float("inf")
    assert "expected input" in report.failure


def test_nan_is_never_exact(pair):
    flat, deep = pair
    deep.norm.bias.data[0] = float("nan")
    assert not verify(flat, deep).exact


@pytest.mark.parametrize("training", [True, False])
def test_both_networks_stay_as_they_were(pair, training):
    before = copy.deepcopy(pair)
    for net in pair:
        net.train(training)
    verify(*pair)
    for net, old in zip(pair, before, strict=True):
        assert net.training is training
        assert all(torch.equal(v, old.state_dict()[k]) for k, v in net.state_dict().items())
        assert all(p.dtype == torch.float32 for p in net.parameters())


def test_depth_and_size_are_those_asked_for(pair):
    report = verify(*pair, depth=12, size=24)
    assert (report.depth, report.size) == (12, 24)
    assert report.exact


def test_the_volume_is_deep_enough_for_two_positions():
    flat = nn.Conv2d(1, 1, 1, 16)
    deep = nn.Conv3d(1, 1, 1, 16)
    deep.load_state_dict({"weight": flat.weight.detach().unsqueeze(2), "bias": flat.bias.detach()})
    report = verify(flat, deep)
    assert report.exact
    assert report.depth == 32


def test_the_report_has_plain_values_for_json(pair):
    import json

    report = verify(*pair)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["max_rel_error"] == report.max_rel_error
    assert set(content) == {"levels", "max_rel_error", "mixes_depth", "can_mix_depth", "proof"}


class Greedy(SliceBySlice):
    def forward(self, volume):
        return super().forward(volume), torch.empty(10**13)


def test_too_little_memory_is_no_difference(pair):
    with pytest.raises(ResourceError, match="too little memory for the proof"):
        verify(pair[0], Greedy(pair[0]))
