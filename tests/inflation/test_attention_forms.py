"""The forms of attention over slices that a plan can ask for: each exact, and each refused when broken."""

import itertools
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from medi3d.errors import InexactError, PlanError
from medi3d.inflation import KernelPlan, inflate, verify
from medi3d.inflation.fold import Call
from medi3d.inflation.network import build, describe
from medi3d.inflation.plan import Override
from medi3d.inflation.rules import divided, joint, windows

SLICEWISE = KernelPlan("slice-wise", kernel=1, stride=1)  # nothing but attention joins slices
WINDOWS = replace(SLICEWISE, attention_form="windows", attention=3)
DIVIDED = replace(SLICEWISE, attention_form="divided", attention=3)
TIMESFORMER = replace(DIVIDED, attention="all", statistics="volume")
ALL = replace(SLICEWISE, attention="all")


class Maps(nn.Module):
    """Feature maps of a transformer of timm's, as its `features_only` gives them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.forward_intermediates(x, indices=2, intermediates_only=True)


def vit():
    return Maps(VisionTransformer(64, 32, embed_dim=12, depth=2, num_heads=2, num_classes=0, init_values=1.0))


def swin():
    return Maps(SwinTransformer(64, 8, embed_dim=6, depths=(2, 2), num_heads=(1, 2), window_size=4))


FORMS = {
    "windows": (swin, WINDOWS, True),
    "windows, deep patches": (swin, replace(KernelPlan.isotropic(), attention_form="windows"), True),
    "windows of one slice": (swin, replace(WINDOWS, attention=1), False),
    "divided": (vit, DIVIDED, False),
    "divided, in windows": (swin, DIVIDED, False),
    "divided, one class token": (vit, TIMESFORMER, True),
    "all": (vit, ALL, True),
    "all, in windows": (swin, ALL, True),
}


@pytest.mark.parametrize(("make", "plan", "mixes"), FORMS.values(), ids=FORMS)
def test_form_is_exact_and_the_report_says_whether_it_mixes(make, plan, mixes):
    net = make()
    net3d = inflate(net, plan)
    assert net3d.report.exactness.mixes_depth is mixes
    assert net3d.report.exactness.can_mix_depth is (mixes or plan.attention_form == "divided")
    for depth in (1, 13, 64):
        assert verify(net, net3d, depth=depth).max_rel_error <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("depth", [8, 64])
@pytest.mark.parametrize(
    ("name", "plan", "size"),
    [
        ("swin_tiny_patch4_window7_224", {"attention_form": "windows", "attention": 4}, {"window_size": 4}),
        ("deit_tiny_patch16_224", {"attention_form": "divided", "attention": "all"}, {}),
        ("vit_tiny_patch16_224", {"attention_form": "divided", "statistics": "volume"}, {}),
    ],
    ids=["swin", "deit", "vit"],
)
def test_published_networks_are_exact(name, plan, size, depth):
    net = timm.create_model(name, features_only=True, feature_cls="getter", img_size=64, **size)
    net3d, _ = build(net, replace(KernelPlan.isotropic(), **plan), in_channels=1)
    assert verify(net, net3d, depth=depth).max_rel_error <= 1e-9


def touched(net3d, slices):
    """Slices of the last map that feel a change in the middle slice."""
    volume = torch.randn(1, 3, slices, 64, 64, dtype=torch.float64)
    other = volume.clone()
    other[:, :, slices // 2] += 1
    difference = (net3d(volume)[-1] - net3d(other)[-1]).abs().amax(dim=(0, 1, 3, 4))
    return [place for place, change in enumerate(difference) if change > 1e-9]


def test_windows_join_their_slices_and_shift_by_half_a_window():
    net3d, _ = build(swin().double(), replace(WINDOWS, attention=4))
    layer = net3d.network.model.layers[0]
    assert [block.attn.shift for block in layer.blocks] == [0, 2]
    layer.blocks = layer.blocks[1:]
    net3d.network.model.layers[1].blocks = nn.Sequential()
    assert touched(net3d, 12) == [6, 7, 8, 9]


def neighbours(table, size):
    """Relative position bias of Video Swin, `(N, N, heads)`, by coordinates."""
    places = list(itertools.product(*map(range, size)))
    wide = [2 * s - 1 for s in size]
    index = [
        [sum_index([a - b + s - 1 for a, b, s in zip(p, q, size, strict=True)], wide) for q in places]
        for p in places
    ]
    return table[torch.tensor(index)]


def sum_index(offset, wide):
    return (offset[0] * wide[1] + offset[1]) * wide[2] + offset[2]


def video_swin(attn, x, size, shift):
    """Video Swin's shifted window attention of `(D, H, W, C)`, window by window, by its paper (sec. 3.2)."""
    bounds = zip(x.shape[:3], size, shift, strict=True)
    axes = [torch.tensor([(i >= n - w) + (i >= n - s) * (s > 0) for i in range(n)]) for n, w, s in bounds]
    label = 9 * axes[0].view(-1, 1, 1) + 3 * axes[1].view(-1, 1) + axes[2]
    x = x.roll([-s for s in shift], dims=(0, 1, 2))
    out = torch.empty_like(x)
    bias = neighbours(attn.relative_position_bias_table, size).movedim(-1, 0)
    for corner in itertools.product(*(range(0, n, w) for n, w in zip(x.shape, size, strict=False))):
        window = tuple(slice(c, c + w) for c, w in zip(corner, size, strict=True))
        tokens, parts = x[window].flatten(0, 2), label[window].flatten()
        q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
        scores = q @ k.transpose(-2, -1) * attn.scale + bias
        scores = scores.masked_fill(parts[:, None] != parts[None], -100)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        out[window] = attn.proj(mixed).unflatten(0, size)
    return out.roll(shift, dims=(0, 1, 2))


@pytest.mark.parametrize("number", [0, 1], ids=["regular", "shifted"])
@torch.no_grad()
def test_windows_are_those_of_video_swin_on_any_volume(number):
    net3d, _ = build(swin().double(), replace(WINDOWS, attention=4))
    block = net3d.network.model.layers[0].blocks[number]
    block.attn.relative_position_bias_table.normal_()
    x = torch.randn(8, 8, 8, 6, dtype=torch.float64)
    expected = video_swin(block.attn, x, (4, 4, 4), (2, 2, 2) if number else (0, 0, 0))
    with net3d.fold.running(Call(batch=1, slices=8)):
        found = block._attn(x)
    torch.testing.assert_close(found, expected)


def test_thin_and_ragged_volumes_have_no_foreign_tokens_in_a_window():
    """Slices that fill up the last window take no part: the others are as in a window of their own."""
    net3d, _ = build(swin().double(), replace(WINDOWS, attention=4))
    net3d.network.model.layers[0].blocks = net3d.network.model.layers[0].blocks[:1]
    net3d.network.model.layers[1].blocks = nn.Sequential()
    volume = torch.randn(1, 3, 6, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(net3d(volume)[-1][:, :, 4:], net3d(volume[:, :, 4:])[-1])


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_mask", lambda self, in_plane, shape, missing, shift: in_plane),
        ("_copies", lambda self: self.relative_position_bias_table.unflatten(0, (5, -1)).cumsum(0)),
    ],
    ids=["mask", "table"],
)
def test_broken_windows_are_refused(monkeypatch, name, broken):
    monkeypatch.setattr(windows.WindowRule, name, broken)
    with pytest.raises(InexactError, match="cannot be inflated exactly"):
        inflate(swin(), WINDOWS)


def test_windows_with_a_trained_table_are_no_2d_network_and_say_so():
    net3d, _ = build(swin(), WINDOWS)
    rule = net3d.network.model.layers[0].blocks[0].attn
    two_d = swin().model.layers[0].blocks[0].attn.relative_position_bias_table
    assert not rule.learnt
    assert rule.flat_state()["relative_position_bias_table"].shape == two_d.shape
    rule.relative_position_bias_table.data.normal_()
    assert rule.learnt
    assert describe(net3d).exact_on == "never"


@torch.no_grad()
def trained(net3d):
    """The network with depth attention that does something."""
    for block in net3d.network.model.blocks:
        block.temporal_fc.weight.normal_()
    return net3d


def test_divided_attention_starts_as_the_2d_network_on_any_volume_and_learns():
    net = vit().double()
    net3d = inflate(net, DIVIDED)
    assert net3d.report.exact_on == "any"
    volume = torch.randn(2, 3, 5, 64, 64, dtype=torch.float64)
    slices = torch.stack([net(volume[:, :, d])[-1] for d in range(5)], dim=2)
    torch.testing.assert_close(net3d(volume)[-1], slices)
    assert describe(trained(net3d)).exact_on == "never"
    assert touched(net3d, 9) == [2, 3, 4, 5, 6]  # two blocks, one neighbour on each side each
    net3d(volume)[-1].square().sum().backward()
    assert all(p.grad is not None for n, p in net3d.named_parameters() if ".blocks." in n)


def timesformer(block, x):
    """A block of TimeSformer on `(B, D, 1 + N, C)` as the authors have it; class tokens are equal."""
    places = x[:, :, 1:]
    along = block.temporal_norm1(places).transpose(1, 2).flatten(0, 1)
    along = attend(along, block.temporal_attn)
    along = block.temporal_fc(along).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    x = torch.cat([x[:, :, :1], places + along], dim=2)
    space = attend(block.norm1(x).flatten(0, 1), block.attn)
    space = space.unflatten(0, x.shape[:2])
    space = torch.cat([space[:, :, :1].mean(1, keepdim=True).expand_as(x[:, :, :1]), space[:, :, 1:]], dim=2)
    x = x + block.ls1(space)
    return x + block.ls2(block.mlp(block.norm2(x)))


def attend(x, layer):
    """Torch's own multi-head attention with the weights of a layer."""
    x = x.transpose(0, 1)
    inner, outer = [(linear.weight, linear.bias) for linear in (layer.qkv, layer.proj)]
    settings = (x.shape[-1], layer.num_heads, *inner, None, None, False, 0.0, *outer, False)
    out, _ = F.multi_head_attention_forward(x, x, x, *settings)
    return out.transpose(0, 1)


@torch.no_grad()
def test_divided_attention_with_one_class_token_is_timesformer():
    net3d = trained(build(vit().double(), TIMESFORMER)[0])
    block = net3d.network.model.blocks[0]
    x = torch.randn(2, 5, 5, 12, dtype=torch.float64)
    x[:, :, 0] = x[:, :1, 0]
    with net3d.fold.running(Call(batch=2)):
        found = block(x.flatten(0, 1))
    torch.testing.assert_close(found.unflatten(0, (2, 5)), timesformer(block, x))


def test_divided_attention_has_timesformers_names_and_starts_as_copy():
    block = inflate(vit(), DIVIDED).network.model.blocks[0]
    new = {name for name, _ in block.named_parameters() if name.startswith("temporal_")}
    assert new == {
        f"temporal_{layer}.{kind}"
        for layer in ("norm1", "attn.qkv", "attn.proj", "fc")
        for kind in ("weight", "bias")
    }
    assert torch.equal(block.temporal_attn.qkv.weight, block.attn.qkv.weight)


def test_broken_divided_attention_is_refused(monkeypatch):
    monkeypatch.setattr(divided.nn.init, "zeros_", lambda parameter: nn.init.constant_(parameter, 0.1))
    with pytest.raises(InexactError, match=r"module 'model.blocks.0'"):
        inflate(vit(), DIVIDED)


def test_broken_attention_over_all_slices_is_refused(monkeypatch):
    monkeypatch.setattr(
        joint._OneSlice, "_join", lambda self, x: x.unflatten(0, (self.batch, -1)).flatten(0, 1)
    )
    with pytest.raises(InexactError):
        inflate(vit(), ALL)


def test_attention_over_all_slices_is_attention_in_one_long_slice():
    net3d, _ = build(vit().double(), ALL)
    attention = net3d.network.model.blocks[0].attn
    x = torch.randn(10, 5, 12, dtype=torch.float64)
    long = x.unflatten(0, (2, 5)).flatten(1, 2)
    with net3d.fold.running(Call(batch=2)):
        found = attention(x)
    torch.testing.assert_close(found.view(2, 25, 12), attend(long, attention))


def test_form_is_overridden_by_layer():
    override = Override("model.layers.1.*", attention_form="windows", kernel=2)
    plan = replace(SLICEWISE, overrides=(override,))
    rules = {
        layer.name.split(".")[2]: layer
        for layer in inflate(swin(), plan).report.layers
        if "attn" in layer.name
    }
    assert {n: (layer.rule, layer.kernel_3d[0]) for n, layer in rules.items()} == {
        "0": ("AttentionRule", 3),
        "1": ("WindowRule", 2),
    }


class Bare(nn.Module):
    """Attention outside of a transformer's block."""

    def __init__(self):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 12, 8, 8), vit().model.blocks[0].attn

    def forward(self, x):
        return self.attn(self.stem(x).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8))


@pytest.mark.parametrize(
    ("net", "plan", "message"),
    [
        (vit(), WINDOWS, "layer 'model.blocks.0.attn': Attention cannot have attention_form 'windows'"),
        (Bare(), DIVIDED, "layer 'attn': divided attention needs a block with `norm1` .*, not Bare"),
    ],
    ids=["windows", "divided"],
)
def test_form_that_a_network_cannot_have_is_refused(net, plan, message):
    with pytest.raises(PlanError, match=message):
        inflate(net, plan)
    inflate(net, replace(plan, attention=1))  # no slices to join, in whatever form
