"""X3D-M (Feichtenhofer 2020, arXiv:2004.04730): a 2D network of depthwise blocks, and a plan for its time.

Layers and widths as PySlowFast builds them; squeeze-excitation pools over the whole clip. Time is padded by
replication.
"""

from typing import Any

from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.inflation.plan import Override
from medi3d.models.classifier import Classifier
from medi3d.models.encoders import draw_kernels
from medi3d.models.video.registry import VideoOptions, register_video
from medi3d.models.video.residual import frame_wise

torchvision_shim.install()
from timm.layers import ConvNormAct, make_divisible  # noqa: E402 - timm needs the shim
from torchvision.ops.misc import SqueezeExcitation  # noqa: E402

BOTTLENECK = 2.25
STAGES = ((24, 3), (48, 5), (96, 11), (192, 7))
"""Channels and blocks of each stage."""


class Block(nn.Module):
    """1×1 to 2.25 times the width, 3×3 depthwise, squeeze-excite in every other block, swish, 1×1 back."""

    def __init__(self, before: int, after: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        inner = int(BOTTLENECK * after)
        self.expand = ConvNormAct(before, inner)
        self.depthwise = ConvNormAct(inner, inner, 3, stride=stride, groups=inner, apply_act=False)
        self.squeeze = SqueezeExcitation(inner, make_divisible(inner / 16)) if squeeze else nn.Identity()
        self.act = nn.SiLU(inplace=True)
        self.project = ConvNormAct(inner, after, apply_act=False)
        narrow = ConvNormAct(before, after, stride=stride, apply_act=False)
        self.shortcut = narrow if stride > 1 else nn.Identity()
        self.join = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, before, H, W)` -> `(N, after, H / stride, W / stride)`."""
        inside = self.squeeze(self.depthwise(self.expand(x)))
        return self.join(self.shortcut(x) + self.project(self.act(inside)))


class X3D(nn.Module):
    """X3D-M in 2D, up to its last convolution: image -> a list with one map, of 432 channels at stride 32."""

    def __init__(self) -> None:
        super().__init__()
        width = STAGES[0][0]
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.stem_time = ConvNormAct(width, width, groups=width)
        blocks = []
        for channels, count in STAGES:
            for number in range(count):
                stride = 2 if number == 0 else 1
                blocks.append(Block(width, channels, stride, squeeze=number % 2 == 0))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.last = ConvNormAct(width, int(BOTTLENECK * width))

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(N, 3, H, W)` -> `[(N, 432, H/32, W/32)]`."""
        return [self.last(self.blocks(self.stem_time(self.stem(x))))]


@register_video("x3d_m")
def _x3d_m(options: VideoOptions) -> nn.Module:
    plan = frame_wise(
        "x3d_m",
        Override("stem_time.conv", kernel=5),
        Override("blocks.*.depthwise.conv", kernel=3),
        statistics="volume",
    )
    encoder: Any = options.encoder(X3D(), plan)
    draw_kernels(encoder)
    return Classifier(encoder, options.num_classes, dropout=options.dropout, hidden=2048)
