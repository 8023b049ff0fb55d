"""Rules for layers that keep their own code, and the table of families: each fails when it is broken."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath, SpaceToDepth
from timm.models.csatv2 import LearnableDct2d
from torch import nn

from medi3d.errors import InexactError, PlanError
from medi3d.inflation import KernelPlan, families, inflate
from medi3d.inflation.network import build
from medi3d.inflation.plan import Override
from medi3d.inflation.rules import adopted


class Attention(nn.Module):
    """One head over all positions of a slice, as timm writes it: switchable to torch's own attention."""

    def __init__(self, channels, bias=False):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.bias = nn.Parameter(torch.randn(1, 256, 256)) if bias else None
        self.fused_attn = False

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)  # (N, 1, L, C)
        if self.fused_attn:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).squeeze(1)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        return ((scores if self.bias is None else scores + self.bias).softmax(dim=-1) @ v).squeeze(1)


class Transformer(nn.Module):
    """A patch embedding and attention; reads the batch size before the stem and uses it after (stale)."""

    def __init__(self, stale, bias=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.attn = Attention(8, bias)
        self.stale = stale

    def forward(self, x):
        batch = x.shape[0]
        x = self.stem(x)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        x = x.transpose(1, 2)
        return x.reshape(batch, -1, height, width) if self.stale else x.unflatten(2, (height, width))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "with positions"])
def test_attention_over_neighbours_is_exact_and_mixes(bias):
    report = inflate(Transformer(stale=False, bias=bias)).report
    assert report.exactness.exact
    assert report.exactness.mixes_depth
    assert not inflate(Transformer(stale=False), "planar").report.exactness.mixes_depth


def test_attention_sees_the_neighbours_and_no_further():
    net = Transformer(stale=False).double()
    net3d, _ = build(net, KernelPlan("thin", stride=1, kernel=1, attention=3))
    volume = torch.randn(1, 3, 7, 16, 16, dtype=torch.float64)
    other = volume.clone()
    other[:, :, 3] += 1
    changed = (net3d(volume) - net3d(other)).abs().amax(dim=(0, 1, 3, 4)) > 1e-9
    assert changed.tolist() == [False, False, True, True, True, False, False]


def test_broken_attention_is_refused(monkeypatch):
    monkeypatch.setattr(adopted._NeighbouringKeys, "_widen", lambda self, x: torch.cat([x, x * 0, x], dim=-2))
    with pytest.raises(InexactError, match="module 'attn' \\(AttentionRule"):
        inflate(Transformer(stale=False))


def test_even_reach_is_refused():
    with pytest.raises(PlanError, match="attention is 2; use an odd integer"):
        KernelPlan("even", attention=2)


def test_parameters_keep_their_names():
    net = Transformer(stale=False)
    assert list(inflate(net).network.state_dict()) == list(net.state_dict())
    assert type(net.attn) is Attention


def test_stale_batch_is_refused_unless_the_table_moves_the_stride_to_the_entry(monkeypatch):
    with pytest.raises(InexactError):
        inflate(Transformer(stale=True))
    monkeypatch.setitem(families.PACING, __name__, "entry")
    net3d = inflate(Transformer(stale=True))
    assert net3d.strides == [(4, 4, 4)]
    assert net3d(torch.randn(2, 3, 9, 16, 16)).shape == (2, 8, 3, 4, 4)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tubelet_is_the_3d_convolution(monkeypatch, channels):
    monkeypatch.setitem(families.PACING, __name__, "entry")
    net3d, _ = build(Transformer(stale=True).double(), KernelPlan.isotropic(), in_channels=channels)
    stem = net3d.network.stem
    stem.weight.data.normal_()
    volume = torch.randn(2, channels, 8, 16, 16, dtype=torch.float64)
    with net3d.fold.folded(volume) as slices:
        found = net3d.fold.unfold(stem(slices))
    torch.testing.assert_close(found, F.conv3d(volume, stem.weight, stem.bias, stride=4))


def test_family_without_steps_keeps_all_slices(monkeypatch):
    monkeypatch.setitem(families.PACING, __name__, "none")
    net3d = inflate(Transformer(stale=True))
    assert net3d.strides == [(1, 4, 4)]


@pytest.mark.parametrize("slices", [1, 2, 7])
def test_merged_patches_are_means_of_slices(slices):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), SpaceToDepth(4)).double()
    net3d, _ = build(net, KernelPlan.isotropic())
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    out = net3d(image.unsqueeze(2).repeat(1, 1, slices, 1, 1))
    assert out.shape == (2, 64, -(-slices // 4), 2, 2)
    torch.testing.assert_close(out, net(image).unsqueeze(2).expand_as(out))


@pytest.mark.parametrize("slices", [1, 8, 9])
def test_cosine_transform_steps_by_its_block(slices):
    net = nn.Sequential(LearnableDct2d(8), nn.Conv2d(32, 2, 1)).double().eval()
    net3d, _ = build(net, KernelPlan.isotropic())
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    out = net3d(image.unsqueeze(2).repeat(1, 1, slices, 1, 1))
    assert out.shape[2:] == (-(-slices // 8), 8, 8)
    torch.testing.assert_close(out, net(image).unsqueeze(2).expand_as(out))


class Asking(nn.Module):
    """Pads by what it asks its convolution for (DaViT)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, 2)

    def forward(self, x):
        height, width = self.conv.kernel_size
        return self.conv(F.pad(x, (0, -x.shape[-1] % width, 0, -x.shape[-2] % height)))


def test_code_around_a_convolution_finds_what_it_asks_for():
    assert inflate(Asking()).strides == [(2, 2, 2)]


def test_enlarging_undoes_the_steps():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Upsample(scale_factor=2))
    net3d = inflate(net)
    assert net3d.strides == [(1, 1, 1)]
    assert net3d(torch.randn(1, 1, 6, 8, 8)).shape == (1, 2, 6, 8, 8)


class Functional(nn.Module):
    """A strided convolution beside a pool that is called as a function."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 2, 3, 2, 1), pool

    def forward(self, x):
        return self.conv(x) + self.pool(x)


@pytest.mark.parametrize(
    "pool",
    [lambda x: F.max_pool2d(x, 3, stride=2, padding=1), lambda x: F.avg_pool2d(x, kernel_size=2)],
    ids=["max", "mean"],
)
def test_functional_pools_step_beside_layers(pool):
    assert inflate(Functional(pool)).report.exactness.exact


def test_stochastic_depth_drops_whole_volumes():
    net3d, _ = build(nn.Sequential(nn.Conv2d(1, 4, 1), DropPath(0.5)), KernelPlan.isotropic())
    out = net3d.train()(torch.ones(64, 1, 5, 2, 2))
    dropped = (out == 0).flatten(2).all(dim=2).all(dim=1)
    whole = (out != 0).flatten(1).all(dim=1)
    assert bool((dropped | whole).all())
    assert 0 < int(dropped.sum()) < 64


def test_override_reaches_attention_too():
    plan = KernelPlan("mine", overrides=(Override("attn", kernel=1),))
    rows = {layer.name: layer for layer in inflate(Transformer(stale=False), plan).report.layers}
    assert rows["attn"].kernel_3d[0] == 1
    assert rows["attn"].rule == "AttentionRule"
