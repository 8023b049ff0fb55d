"""Where a network steps along depth if it cannot do so where it steps in-plane: each rule, also broken."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d
from timm.layers.halo_attn import HaloAttn
from timm.models._efficientnet_blocks import CondConvResidual
from timm.models.efficientformer_v2 import Attention2dDownsample
from timm.models.hieradet_sam2 import MultiScaleBlock as SamBlock
from timm.models.mvitv2 import MultiScaleBlock
from timm.models.pit import Pooling
from timm.models.vision_transformer import Block
from timm.utils import reparameterize_model
from torch import nn

from medi3d.errors import InexactError, PlanError
from medi3d.inflation import KernelPlan, families, inflate
from medi3d.inflation.network import build
from medi3d.inflation.rules import generated, stepping, tubelet


class Stale(nn.Module):
    """Reads the batch size before its stem and uses it after."""

    def __init__(self, stem):
        super().__init__()
        self.stem, self.mlp = stem, nn.Conv2d(4, 4, 1)

    def forward(self, x):
        batch = x.shape[0]
        x = self.stem(x)
        return self.mlp(x).reshape(batch, 4, *x.shape[-2:])


class Stem(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1))


STEMS = {"overlapping": lambda: nn.Conv2d(3, 4, 7, 4, 3), "layers": Stem}


@pytest.fixture
def at_entry(monkeypatch):
    monkeypatch.setitem(families.PACING, __name__, "entry")
    monkeypatch.setattr(families, "HOISTED", {f"{__name__}.Stem"})


@pytest.mark.parametrize("stem", STEMS.values(), ids=STEMS)
def test_stem_of_any_layers_takes_its_steps_at_the_entry(at_entry, stem):
    net3d = inflate(Stale(stem()))
    assert net3d.strides == [(4, 4, 4)]
    assert net3d.report.exactness.mixes_depth
    assert net3d(torch.randn(2, 3, 9, 16, 16)).shape == (2, 4, 3, 4, 4)


def test_hoisted_stem_is_the_3d_convolution(at_entry):
    net3d, _ = build(Stale(STEMS["overlapping"]()).double(), KernelPlan.isotropic(), in_channels=2)
    stem = net3d.network.stem
    stem.weight.data.normal_()
    volume = torch.randn(2, 2, 8, 16, 16, dtype=torch.float64)
    with net3d.fold.folded(volume) as slices:
        found = net3d.fold.unfold(stem(slices))
    padded = F.pad(F.pad(volume, (0, 0, 0, 0, 3, 3), mode="replicate"), (3, 3, 3, 3))
    torch.testing.assert_close(found, F.conv3d(padded, stem.weight, stem.bias, stride=4))


def test_stale_batch_without_hoisting_is_refused():
    with pytest.raises(InexactError):
        inflate(Stale(Stem()))


def test_broken_hoisting_is_refused(at_entry, monkeypatch):
    monkeypatch.setattr("medi3d.inflation.fold.Fold.ungroup", lambda self, x: x[:, :3].repeat(4, 1, 1, 1))
    with pytest.raises(InexactError):
        inflate(Stale(Stem()))


def test_steps_that_are_no_powers_of_two_cannot_be_hoisted(at_entry, monkeypatch):
    with pytest.raises(PlanError, match="powers of two"):
        inflate(Stale(nn.Conv2d(3, 4, 7, 3, 3)))
    monkeypatch.setattr(tubelet, "_LARGEST", 15)
    assert inflate(Stale(nn.Conv2d(3, 4, 7, 3, 3))).strides == [(3, 3, 3)]


class Reduced(nn.Module):
    """Attention whose keys and values come from a shrunken slice (PVT)."""

    def __init__(self):
        super().__init__()
        self.stem, self.sr = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 2, 2)

    def forward(self, x):
        x = self.stem(x)
        batch = x.shape[0]
        keys = self.sr(x).reshape(batch, 4, -1)
        scores = x.flatten(2).transpose(1, 2) @ keys
        return (scores.softmax(-1) @ keys.transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def test_no_step_inside_of_held_layers(monkeypatch):
    with pytest.raises(InexactError):
        inflate(Reduced())
    monkeypatch.setitem(families.HELD, f"{__name__}.Reduced", lambda layer: False)
    with pytest.raises(InexactError):
        inflate(Reduced())
    monkeypatch.setitem(families.HELD, f"{__name__}.Reduced", lambda layer: True)
    net3d = inflate(Reduced())
    assert net3d.strides == [(1, 2, 2)]


class Borrowing(nn.Module):
    """A network of its own, with a block of a family whose networks take all steps at the entry."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 4, 4), Block(8, 2)
        self.down = nn.Conv2d(8, 8, 2, 2)

    def forward(self, x):
        x = self.stem(x)
        tokens = self.block(x.flatten(2).transpose(1, 2))
        return self.down(tokens.transpose(1, 2).unflatten(2, x.shape[-2:]))


def test_a_borrowed_block_does_not_bring_its_familys_pacing():
    assert inflate(Borrowing()).strides == [(8, 8, 8)]


class Attending(nn.Module):
    """A block that shrinks its output, behind patches; beside it a pool that steps as it should."""

    def __init__(self, block, tokens=False):
        super().__init__()
        self.conv, self.block, self.pool, self.tokens = (
            nn.Conv2d(3, 8, 8, 8),
            block,
            nn.AvgPool2d(2),
            tokens,
        )

    def forward(self, x):
        x = self.conv(x)
        beside = self.pool(x)
        if self.tokens == "rows":
            out, size = self.block(x.flatten(2).transpose(1, 2), list(x.shape[-2:]))
            out = out.transpose(1, 2).unflatten(2, size)
        elif self.tokens:
            out = self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            out = self.block(x)
        return out + beside


BLOCKS = {
    "halo": lambda: Attending(HaloAttn(8, 8, stride=2, num_heads=2, block_size=4, halo_size=1)),
    "efficientformer": lambda: Attending(Attention2dDownsample(8, 4, 2, 2, resolution=8, out_dim=8)),
    "hiera": lambda: Attending(SamBlock(8, 16, 2, q_stride=(2, 2), window_size=4), tokens=True),
    "mvit": lambda: Attending(
        MultiScaleBlock(
            *(8, 8, 2, (8, 8)),
            kernel_q=(3, 3),
            stride_q=(2, 2),
            kernel_kv=(3, 3),
            stride_kv=(4, 4),
            has_cls_token=False,
            expand_attn=False,
        ),
        tokens="rows",
    ),
    "condconv": lambda: Attending(CondConvResidual(8, 8, stride=2, exp_ratio=2.0, num_experts=3)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_steps_at_its_end(name, monkeypatch):
    net = BLOCKS[name]()
    if name == "hiera":  # it doubles the channels
        net.pool = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 16, 1))
    monkeypatch.delitem(families.PACING, "timm.models.mvitv2")  # its root takes no step; its block can
    net3d = inflate(net)
    assert net3d.strides == [(16, 16, 16)]
    monkeypatch.setattr(stepping, "mean_of_slices", lambda x, rule: x)
    with pytest.raises(InexactError):
        inflate(net)


class Pooled(nn.Module):
    """Class tokens beside the map, which must step as it does (PiT)."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 4, 8, 8), Pooling(4, 4, 2)

    def forward(self, x):
        x = self.stem(x)
        x, tokens = self.pool(x, x.mean((2, 3)))
        return torch.cat([tokens[:, :, None], x.flatten(2)], dim=2)[:, :, 1:].unflatten(2, x.shape[-2:])


def test_class_tokens_step_with_the_map():
    net3d = inflate(Pooled())
    assert net3d.strides == [(16, 16, 16)]
    assert net3d(torch.randn(2, 3, 32, 64, 64)).shape == (2, 4, 2, 4, 4)


class Generated(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.conv, self.routing = CondConv2d(3, 4, 3, stride, padding=1, num_experts=2), nn.Linear(3, 2)
        self.stem = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.conv(x, self.routing(x.mean((2, 3))).sigmoid())


@pytest.mark.parametrize("stride", [1, 2])
def test_generated_kernels_mix_slices_by_their_mean(stride, monkeypatch):
    net3d = inflate(Generated(stride))
    assert net3d.strides == [(stride,) * 3]
    assert net3d.report.exactness.mixes_depth
    monkeypatch.setattr(generated.AvgPoolRule, "combine", staticmethod(sum))
    with pytest.raises(InexactError):
        inflate(Generated(stride))


def test_tied_kernels_stay_tied():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False))
    net[2].weight = net[0].weight
    net3d = inflate(net)
    assert net3d.network[0].weight is net3d.network[2].weight
    assert net3d.report.parameters == 4 * 4 * 27 + 4


@pytest.mark.parametrize("name", ["repvgg_a0", "repghostnet_050", "repvit_m0_9"])
def test_branches_melted_into_one_kernel_are_inflated_like_the_rest(name):
    net = timm.create_model(name, features_only=True, out_indices=(0, 1)).eval()
    melted = reparameterize_model(net)
    assert len(list(melted.modules())) < len(list(net.modules()))
    assert inflate(melted).report.exactness.mixes_depth


class Keys(nn.Module):
    """Attention to keys of half the resolution, which must not pass for the resolution of the output."""

    def __init__(self):
        super().__init__()
        self.stem, self.keys = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 2, 2)

    def forward(self, x):
        x = self.stem(x)
        return x * self.keys(x).amax((1, 2, 3)).mean()


def test_coarse_keys_do_not_coarsen_what_attends_to_them():
    net3d, _ = build(Keys(), KernelPlan.isotropic())
    assert net3d.strides == [(4, 4, 4)]


@pytest.mark.parametrize(
    ("conv", "mixes"),
    [
        (nn.Conv2d(1, 1, 3, padding=1), True),
        (nn.Conv2d(1, 1, 7, 4, 3), True),
        (nn.Conv2d(1, 1, 2, 2), False),
        (nn.Conv2d(1, 1, 1), False),
    ],
    ids=["3", "7 by 4", "patches", "points"],
)
@pytest.mark.parametrize("depth", [8, 12, 32])
def test_the_proof_sees_mixing_on_either_side(conv, mixes, depth):
    from medi3d.inflation import verify

    net3d, _ = build(conv, KernelPlan.isotropic())
    assert verify(conv, net3d, depth=depth).mixes_depth == mixes
