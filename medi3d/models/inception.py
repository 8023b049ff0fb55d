"""Inception-V1 with batch normalisation: the 2D network that I3D inflates, under I3D's published layer names.

Written once, in 2D. Inflated with the `video` plan it *is* I3D and takes the Kinetics weights; with the
`isotropic` plan it is the medical variant and takes the same weights.

Papers: Szegedy et al. 2015 (arXiv:1409.4842, table 1: the nine modules); Carreira & Zisserman 2017
(arXiv:1705.07750, figure 3). Reference: google-deepmind/kinetics-i3d, i3d.py (Apache-2.0), whose names are
kept, "3d" included. Different here: the running statistics move by PyTorch's 0.1 a step (published: 0.001),
and the head averages over whatever space is left, so that inputs larger than 224 pass.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.errors import ShapeError, SourceError

torchvision_shim.install()
from timm.layers import create_conv2d, create_pool2d  # noqa: E402 - timm needs the shim


class MixedChannels(NamedTuple):
    """Output channels of one Inception module: 1x1 | 1x1 then 3x3 | 1x1 then 3x3 | pool then 1x1."""

    branch_0: int
    branch_1: tuple[int, int]
    branch_2: tuple[int, int]
    branch_3: int

    @property
    def total(self) -> int:
        """Channels of the concatenation."""
        return self.branch_0 + self.branch_1[1] + self.branch_2[1] + self.branch_3


MIXED_CHANNELS = {
    "Mixed_3b": MixedChannels(64, (96, 128), (16, 32), 32),
    "Mixed_3c": MixedChannels(128, (128, 192), (32, 96), 64),
    "Mixed_4b": MixedChannels(192, (96, 208), (16, 48), 64),
    "Mixed_4c": MixedChannels(160, (112, 224), (24, 64), 64),
    "Mixed_4d": MixedChannels(128, (128, 256), (24, 64), 64),
    "Mixed_4e": MixedChannels(112, (144, 288), (32, 64), 64),
    "Mixed_4f": MixedChannels(256, (160, 320), (32, 128), 128),
    "Mixed_5b": MixedChannels(256, (160, 320), (32, 128), 128),
    "Mixed_5c": MixedChannels(384, (192, 384), (48, 128), 128),
}

POOL_KERNELS = {"MaxPool3d_2a_3x3": 3, "MaxPool3d_3a_3x3": 3, "MaxPool3d_4a_3x3": 3, "MaxPool3d_5a_2x2": 2}

LAYERS = (
    *("Conv3d_1a_7x7", "MaxPool3d_2a_3x3", "Conv3d_2b_1x1", "Conv3d_2c_3x3"),
    *("MaxPool3d_3a_3x3", "Mixed_3b", "Mixed_3c"),
    *("MaxPool3d_4a_3x3", "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"),
    *("MaxPool3d_5a_2x2", "Mixed_5b", "Mixed_5c"),
)
"""The trunk in order; each is an end point that can be asked for."""

DEFAULT_END_POINTS = ("Conv3d_1a_7x7", "Conv3d_2c_3x3", "Mixed_3c", "Mixed_4f", "Mixed_5c")
"""The last layer at each resolution, strides 2, 4, 8, 16, 32: the input of a U-Net decoder."""


class BatchNormWithoutScale(nn.BatchNorm2d):
    """Batch normalisation that shifts but does not scale, as published (eps 1e-3, no gamma).

    `weight` is None, not a frozen tensor of ones: the checkpoints have no such tensor, so the state dict has
    none.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)
        self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        """Zero shift, and running statistics as new."""
        self.reset_running_stats()
        nn.init.zeros_(self.bias)


def _unit(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Module:
    """Convolution without bias (TensorFlow's "same" padding), normalisation, ReLU: `Unit3D` as published."""
    conv = create_conv2d(in_channels, out_channels, kernel, stride=stride, padding="same", bias=False)
    bn = BatchNormWithoutScale(out_channels)
    return nn.Sequential(OrderedDict(conv=conv, bn=bn, relu=nn.ReLU(inplace=True)))


def _max_pool(kernel: int, stride: int) -> nn.Module:
    return create_pool2d("max", kernel, stride=stride, padding="same")


class Mixed(nn.Module):
    """One Inception module: four branches side by side, concatenated over channels."""

    def __init__(self, in_channels: int, channels: MixedChannels) -> None:
        super().__init__()
        self.Branch_0 = nn.Sequential(OrderedDict(Conv3d_0a_1x1=_unit(in_channels, channels.branch_0, 1)))
        self.Branch_1 = self._reduce_then_3x3(in_channels, *channels.branch_1)
        self.Branch_2 = self._reduce_then_3x3(in_channels, *channels.branch_2)
        self.Branch_3 = nn.Sequential(
            OrderedDict(
                MaxPool3d_0a_3x3=_max_pool(3, stride=1),
                Conv3d_0b_1x1=_unit(in_channels, channels.branch_3, 1),
            )
        )

    @staticmethod
    def _reduce_then_3x3(in_channels: int, reduced: int, out_channels: int) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                Conv3d_0a_1x1=_unit(in_channels, reduced, 1),
                Conv3d_0b_3x3=_unit(reduced, out_channels, 3),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, total, H, W)."""
        return torch.cat([self.Branch_0(x), self.Branch_1(x), self.Branch_2(x), self.Branch_3(x)], dim=1)


class Logits(nn.Module):
    """The published head: 7x7 average pool ("valid"), dropout, 1x1 convolution with bias, mean over space."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.avg_pool = nn.AvgPool2d(7, stride=1)
        self.dropout = nn.Dropout(dropout)
        self.Conv3d_0c_1x1 = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes).

        Raises:
            ShapeError: H or W is below 7 (with the published stem stride: images below 193 pixels).
        """
        if min(x.shape[-2:]) < 7:
            raise ShapeError(
                f"Inception-V1's head pools 7x7 but its features are {tuple(x.shape[-2:])}: "
                "give larger images (224 x 224 as published, 193 x 193 at least)"
            )
        x = self.dropout(self.avg_pool(x))  # (N, in_channels, H - 6, W - 6)
        return self.Conv3d_0c_1x1(x).mean(dim=(-2, -1))


class InceptionV1(nn.Sequential):
    """The trunk as an encoder: image (N, in_channels, H, W) -> list of feature maps, one per end point.

    `out_channels` and `strides` describe each map. Only layers up to the last end point are built.
    A `stem_stride` of 1 (published: 2) halves every stride, for volumes too small to be halved at once.

    Raises:
        SourceError: an end point that the network does not have.
    """

    def __init__(
        self,
        end_points: Sequence[str] = DEFAULT_END_POINTS,
        *,
        in_channels: int = 3,
        stem_stride: int = 2,
    ) -> None:
        unknown = sorted(set(end_points) - set(LAYERS))
        if unknown or not end_points:
            raise SourceError(
                f"inception_v1 has no end points {unknown}: choose one or more of {', '.join(LAYERS)}"
            )
        ordered = tuple(name for name in LAYERS if name in end_points)
        trunk = _trunk(in_channels, stem_stride, last=ordered[-1])
        super().__init__(OrderedDict((layer.name, layer.module) for layer in trunk))
        offered = [layer for layer in trunk if layer.name in ordered]
        self.end_points = ordered
        self.out_channels = [layer.channels for layer in offered]
        self.strides = [layer.stride for layer in offered]

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """(N, in_channels, H, W) -> maps (N, out_channels[i], H / strides[i], W / strides[i]), rounded up."""
        features = []
        for name, layer in self.named_children():
            x = layer(x)
            if name in self.end_points:
                features.append(x)
        return features


class InceptionV1Classifier(nn.Sequential):
    """Trunk and published head: image (N, in_channels, H, W) -> logits (N, num_classes).

    The same names as `InceptionV1`, so the same key map fits both.
    """

    def __init__(
        self, num_classes: int = 400, *, in_channels: int = 3, stem_stride: int = 2, dropout: float = 0.5
    ) -> None:
        trunk = _trunk(in_channels, stem_stride, last=LAYERS[-1])
        super().__init__(OrderedDict((layer.name, layer.module) for layer in trunk))
        self.Logits = Logits(trunk[-1].channels, num_classes, dropout)


class _Layer(NamedTuple):
    name: str
    module: nn.Module
    channels: int
    stride: int


def _trunk(in_channels: int, stem_stride: int, last: str) -> list[_Layer]:
    """The layers from the image to `last`, each with the channels and the stride of its output."""
    layers: list[_Layer] = []
    channels, stride = in_channels, 1
    for name in LAYERS[: LAYERS.index(last) + 1]:
        module: nn.Module
        if name in POOL_KERNELS:
            module, stride = _max_pool(POOL_KERNELS[name], stride=2), stride * 2
        elif name in MIXED_CHANNELS:
            module, channels = Mixed(channels, MIXED_CHANNELS[name]), MIXED_CHANNELS[name].total
        elif name == "Conv3d_1a_7x7":
            module, channels, stride = _unit(channels, 64, 7, stem_stride), 64, stem_stride
        elif name == "Conv3d_2b_1x1":
            module, channels = _unit(channels, 64, 1), 64
        else:  # Conv3d_2c_3x3
            module, channels = _unit(channels, 192, 3), 192
        layers.append(_Layer(name, module, channels, stride))
    return layers
