"""3D ResNets: MedicalNet's, trained on volumes, and r3d and ir-CSN, trained on clips.

All are MONAI's ResNet, which comes from kenshohara/3D-ResNets-PyTorch, with the published strides and
kernels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from monai.networks.nets.resnet import ResNet, ResNetBottleneck, ResNetFeatures
from torch import Tensor, nn

from medi3d.axes import Triple
from medi3d.models.volumetric.encoder import VolumetricEncoder
from medi3d.weights.keymaps.resnet import BLOCKS

WIDTHS = (64, 128, 256, 512)
"""Widths of the stages, as published; a bottleneck outputs four times as many channels."""
STAGES = ("layer1", "layer2", "layer3", "layer4")


class MedicalNet(VolumetricEncoder, ResNetFeatures):  # type: ignore[misc]
    """A ResNet of MedicalNet: MONAI's, with dilation in place of the last two stages' strides, as published.

    Maps: the stem at stride 2, `layer1` at 4, and `layer4` at 8. Depths 18 and 34 have shortcuts without
    parameters (type A); unlike the published code, gradients flow through them.
    """

    def __init__(self, depth: int, in_channels: int = 1, levels: int | None = None) -> None:
        ResNetFeatures.__init__(self, f"resnet{depth}", pretrained=False, in_channels=in_channels)
        for stage, stride, dilation in ((self.layer2, 2, 1), (self.layer3, 1, 2), (self.layer4, 1, 4)):
            _set_strides(stage, stride, dilation)
        self.in_channels, self.normaliser = in_channels, None
        width = ResNetBottleneck.expansion if depth >= 50 else 1
        self.out_channels = [64, 64 * width, 512 * width][:levels]
        self.strides = [(2, 2, 2), (4, 4, 4), (8, 8, 8)][:levels]
        unused = ("layer1", "layer2", "layer3", "layer4") if levels == 1 else ("layer2", "layer3", "layer4")
        for name in unused if len(self.strides) < 3 else ():
            delattr(self, name)

    def maps(self, volume: Tensor) -> list[Tensor]:
        """Maps at strides 2, 4 and 8."""
        maps = [self.act(self.bn1(self.conv1(volume)))]
        if len(self.strides) > 1:
            maps.append(self.layer1(self.maxpool(maps[0])))
        if len(self.strides) > 2:
            maps.append(self.layer4(self.layer3(self.layer2(maps[1]))))
        return maps


def _set_strides(stage: nn.Sequential, stride: int, dilation: int) -> None:
    """Give a stage its published stride and dilation, and its shortcuts of type A their own module."""
    first: Any = stage[0]
    for block in stage.children():
        for conv in block.modules():
            if isinstance(conv, nn.Conv3d):
                if conv.kernel_size != (1, 1, 1):
                    conv.dilation = conv.padding = (dilation,) * 3
                if conv.stride != (1, 1, 1):
                    conv.stride = (stride,) * 3
    if isinstance(first.downsample, partial):
        first.downsample = _PaddedShortcut(first.conv1.out_channels, stride)


class _PaddedShortcut(nn.Module):
    """He et al. 2015, option A: every `stride`-th position, missing channels zero."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.channels - x.shape[1]))


class _Staged(VolumetricEncoder, ResNet):  # type: ignore[misc]
    """A ResNet that strides late in time: maps of the stem and of every stage.

    Args:
        depth: depth of the network, see `BLOCKS`.
        in_channels: channels of the input.
        levels: number of maps to return; later layers are not built. None: all five.
        widths: channels of the stages, before a bottleneck widens them.
        blocks: number of blocks in each stage; None: those of the depth.
    """

    STEM: Any
    """Kernel of the stem; it strides by two in-plane only."""
    STRIDES: Sequence[Triple]

    def __init__(
        self,
        depth: int,
        in_channels: int = 1,
        levels: int | None = None,
        *,
        widths: Sequence[int] = WIDTHS,
        blocks: Sequence[int] | None = None,
    ) -> None:
        block = "bottleneck" if depth >= 50 else "basic"
        ResNet.__init__(
            self,
            block,
            list(blocks or BLOCKS[depth]),
            list(widths),
            n_input_channels=in_channels,
            conv1_t_size=self.STEM,
            conv1_t_stride=(1, 2, 2),  # type: ignore[arg-type]
            feed_forward=False,
            bias_downsample=False,
        )
        self.in_channels, self.normaliser = in_channels, None
        times = ResNetBottleneck.expansion if depth >= 50 else 1
        self.out_channels = [widths[0], *(times * width for width in widths)][:levels]
        self.strides = list(self.STRIDES[:levels])
        for name in STAGES[len(self.strides) - 1 :]:
            delattr(self, name)

    def maps(self, volume: Tensor) -> list[Tensor]:
        """Maps of the stem and the stages."""
        maps = [self.act(self.bn1(self.conv1(volume)))]
        for number, name in enumerate(STAGES[: len(self.strides) - 1]):
            maps.append(self.get_submodule(name)(maps[-1] if number else self.maxpool(maps[-1])))
        return maps


class R3D(_Staged):
    """3D-ResNets-PyTorch (Hara et al. 2018, arXiv:1711.09577; Kataoka et al. 2020, arXiv:2004.04968).

    Stem of 7×7×7 that strides in-plane only, shortcuts of type B. Time is halved from the max-pool on.
    """

    STEM = (7, 7, 7)
    STRIDES = ((1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16), (16, 32, 32))


class IrCSN(_Staged):
    """Interaction-reduced channel-separated network (Tran et al. 2019, arXiv:1904.02811), as in mmaction2.

    Bottlenecks whose 3×3×3 convolution is depthwise; stem of 3×7×7 and a max-pool of 1×3×3, so that only the
    last three stages halve time. Norms have an epsilon of 1e-3.
    """

    STEM = (3, 7, 7)
    STRIDES = ((1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 16), (8, 32, 32))
    EPSILON = 1e-3

    def __init__(self, depth: int, *args: Any, **options: Any) -> None:
        super().__init__(depth, *args, **options)
        self.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eps = self.EPSILON
            elif isinstance(module, ResNetBottleneck):
                module.conv2 = _depthwise(module.conv2)


def _depthwise(conv: Any) -> nn.Conv3d:
    return nn.Conv3d(
        conv.out_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        groups=conv.out_channels,
        bias=False,
    )
