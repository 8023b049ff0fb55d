"""Successors of I3D on residual networks: a 2D ResNet, slightly modified, and a plan for its time axis.

Patterns of the plans name timm's layers. Time is padded by replication, since no published weights are read.
"""

from collections import OrderedDict
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.inflation.plan import KernelPlan, Override
from medi3d.models.classifier import Classifier
from medi3d.models.encoders import draw_kernels
from medi3d.models.sources import build_source
from medi3d.models.video.registry import VideoOptions, register_video

torchvision_shim.install()
import timm  # noqa: E402 - timm needs the shim


def frame_wise(name: str, *overrides: Override, **settings: Any) -> KernelPlan:
    """A plan that does not mix time except in the layers that it names."""
    return KernelPlan(name=name, kernel=1, stride=1, overrides=overrides, **settings)


_EVERY_OTHER = (
    Override("conv1", kernel=5),
    Override("layer1.[012].conv1", kernel=3),
    Override("layer1.3", kernel=2, stride=2),
    Override("layer2.[02].conv1", kernel=3),
    Override("layer3.[024].conv1", kernel=3),
    Override("layer4.1.conv1", kernel=3),
)
"""3×1×1 in every other block, as in the authors' code, and its max-pool in time after the first stage."""


def add_time_pool(resnet: Any) -> None:
    """Add a pool that leaves an image unchanged, for the plan to spread over time."""
    resnet["layer1"].append(nn.MaxPool2d(1))


@register_video("r50_i3d")
def _r50_i3d(options: VideoOptions) -> nn.Module:
    plan = frame_wise("r50_i3d", *_EVERY_OTHER)
    encoder = options.encoder("timm:resnet50", plan, edit=add_time_pool)
    return Classifier(encoder, options.num_classes, dropout=options.dropout)


class NonLocal(nn.Module):
    """A non-local block (embedded Gaussian, keys and values pooled by two): attention as a residual branch.

    It has timm's switch `fused_attn`, so the attention rule spreads it over time. The branch starts at zero.
    """

    fused_attn = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.query, self.key, self.value = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` -> the same."""
        pooled = self.pool(x)
        parts = self.query(x), self.key(pooled), self.value(pooled)
        query, key, value = (part.flatten(2).transpose(1, 2).unsqueeze(1) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value)  # (N, 1, H·W, C / 2)
        return x + self.norm(self.out(seen.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])))


def add_non_local(resnet: Any) -> None:
    """Five blocks: after every other block of the second and third stage."""
    add_time_pool(resnet)
    for stage, channels, blocks in (("layer2", 512, (1, 3)), ("layer3", 1024, (1, 3, 5))):
        for block in blocks:
            resnet[stage][block] = nn.Sequential(resnet[stage][block], NonLocal(channels))


@register_video("r50_nonlocal")
def _r50_nonlocal(options: VideoOptions) -> nn.Module:
    plan = frame_wise("r50_nonlocal", *_EVERY_OTHER, attention="all")
    encoder = options.encoder("timm:resnet50", plan, edit=add_non_local)
    return Classifier(encoder, options.num_classes, dropout=options.dropout)


@register_video("p3d")
def _p3d(options: VideoOptions) -> nn.Module:
    plan = KernelPlan(
        name="p3d",
        overrides=(
            Override("conv1", kernel=1, stride=1),
            Override("maxpool", kernel=2),
            Override("layer4.*", kernel=1),
        ),
    )
    encoder = options.encoder("timm:resnet152", plan, profile="factorised")
    return Classifier(encoder, options.num_classes, dropout=options.dropout)


def centre_windows(encoder: Any, pattern: str) -> nn.Module:
    """Let 1×1 layers that step over time start half a kernel early, as published, so that their windows are
    centred.

    A rule pads time as its layer pads in-plane, and a 1×1 convolution does not.
    """
    for path, rule in encoder.rules().items():
        if fnmatchcase(path, pattern):
            rule.padded = True
    return encoder


def two_plus_one(conv: nn.Conv2d, between: int) -> nn.Sequential:
    """A convolution split into in-plane and 1×1, norm and ReLU between; the plan turns the second to time."""
    size: dict[str, Any] = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
    return nn.Sequential(
        OrderedDict(
            spatial=nn.Conv2d(conv.in_channels, between, bias=False, **size),
            norm=nn.BatchNorm2d(between),
            relu=nn.ReLU(inplace=True),
            temporal=nn.Conv2d(between, conv.out_channels, 1, bias=False),
        )
    )


def factorise(resnet: Any) -> None:
    """R(2+1)D: each 3×3 convolution split in two, as large as a 3×3×3 one; no max-pool."""
    resnet["conv1"] = two_plus_one(resnet["conv1"], 45)
    resnet["maxpool"] = nn.Identity()
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for block in resnet[stage]:
            before, after = block.conv1.in_channels, block.conv1.out_channels
            between = 27 * before * after // (9 * before + 3 * after)
            block.conv1, block.conv2 = (two_plus_one(conv, between) for conv in (block.conv1, block.conv2))


@register_video("r2plus1d_18")
def _r2plus1d_18(options: VideoOptions) -> nn.Module:
    plan = frame_wise(
        "r2plus1d",
        Override("*.temporal", kernel=3),
        Override("layer[234].0.conv1.temporal", stride=2),
        Override("layer[234].0.downsample.0", stride=2),
    )
    encoder = centre_windows(options.encoder("timm:resnet18", plan, edit=factorise), "*.temporal")
    return Classifier(encoder, options.num_classes, dropout=options.dropout)


class SlowFast(nn.Module):
    """SlowFast in 2D: two ResNet-50s, one an eighth as wide, and 1×1 convolutions from it to the other.

    The plan makes the wide one slow: its stem and the lateral convolutions stride by `ALPHA` frames. Returns
    the last map of each, slow first.
    """

    ALPHA = 8
    WIDTHS = (8, 32, 64, 128)
    """Channels of the fast pathway's stem and first three stages."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = _stages(build_source("timm:resnet50")), _stages(_narrow_resnet())
        self.lateral = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(width, 2 * width, 1, bias=False),
                    norm=nn.BatchNorm2d(2 * width),
                    relu=nn.ReLU(inplace=True),
                )
            )
            for width in self.WIDTHS
        )
        for stage, width in enumerate(self.WIDTHS, start=1):
            block: Any = self.slow.get_submodule(f"{stage}.0")
            _take(block, block.conv1.in_channels + 2 * width)

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(N, 3, H, W)` -> maps `(N, 2048, H/32, W/32)` and `(N, 256, H/32, W/32)`."""
        slow, fast = self.slow[0](x), self.fast[0](x)
        for stage, lateral in enumerate(self.lateral, start=1):
            slow = torch.cat([slow, lateral(fast)], dim=1)
            slow, fast = self.slow[stage](slow), self.fast[stage](fast)
        return [slow, fast]


def _stages(resnet: Any) -> nn.ModuleList:
    """Stem and four stages of a timm ResNet as an encoder."""
    stem = nn.Sequential(*(resnet[name] for name in ("conv1", "bn1", "act1", "maxpool")))
    return nn.ModuleList([stem, *(resnet[f"layer{stage}"] for stage in range(1, 5))])


def _narrow_resnet() -> Any:
    """ResNet-50 at an eighth of the width; timm narrows only deep stems."""
    resnet: Any = timm.create_model(
        "resnet50", features_only=True, channels=(8, 16, 32, 64), stem_type="deep", stem_width=4
    )
    resnet["conv1"] = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    return resnet


def _take(block: Any, channels: int) -> None:
    """Set the input channels of a stage's first block."""
    for owner, name in ((block, "conv1"), (block.downsample, "0")):
        conv = getattr(owner, name)
        setattr(owner, name, nn.Conv2d(channels, conv.out_channels, 1, stride=conv.stride, bias=False))


@register_video("slowfast_r50")
def _slowfast_r50(options: VideoOptions) -> nn.Module:
    plan = frame_wise(
        "slowfast_r50",
        Override("slow.0.0", stride=SlowFast.ALPHA),
        Override("slow.[34].*.conv1", kernel=3),
        Override("fast.0.0", kernel=5),
        Override("fast.[1234].*.conv1", kernel=3),
        Override("lateral.*.conv", kernel=5, stride=SlowFast.ALPHA),
    )
    encoder: Any = centre_windows(options.encoder(SlowFast(), plan), "lateral.*.conv")
    draw_kernels(encoder)
    return Classifier(encoder, options.num_classes, dropout=options.dropout, maps=2)
