"""nnU-Net's encoders, plain and residual, for images and for volumes; parameters have its names.

Isensee et al. 2021, "nnU-Net" (doi:10.1038/s41592-020-01008-z) and 2024, "nnU-Net revisited"
(arXiv:2404.09556). Six stages of 3×3(×3) convolutions with instance norm and leaky ReLU; the first keeps the
resolution, the others halve it.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from medi3d.errors import SourceError

FEATURES = (32, 64, 128, 256, 320, 320)
"""Channels of the stages; nnU-Net plans at most 320 for volumes."""
CONVOLUTIONS = 2
"""Convolutions per stage of the plain encoder."""
BLOCKS = (1, 3, 4, 6, 6, 6)
"""Residual blocks per stage, as in nnU-Net's ResEnc presets."""

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


class NnUNetEncoder(nn.Module):
    """One of nnU-Net's encoders; maps at strides 1, 2, 4, ..., fine to coarse.

    Args:
        dims: 2 for images `(N, C, H, W)`, 3 for volumes `(B, C, D, H, W)`.
        residual: the residual encoder (with a stem) in place of the plain one.
        in_channels: channels of the input.
        levels: number of stages to build; None: all six.
        features: channels of the stages.

    Raises:
        SourceError: more levels than there are stages.
    """

    def __init__(
        self,
        dims: int,
        *,
        residual: bool = False,
        in_channels: int = 1,
        levels: int | None = None,
        features: Sequence[int] = FEATURES,
    ) -> None:
        super().__init__()
        if levels is not None and levels > len(features):
            raise SourceError(f"levels is {levels}: nnU-Net's encoders have {len(features)} feature maps")
        features = features[:levels]
        self.stem = _Convolutions(dims, in_channels, features[0], 1, 1) if residual else None
        self.stages = nn.Sequential()
        before = features[0] if residual else in_channels
        for stage, after in enumerate(features):
            stride = 2 if stage else 1
            if residual:
                self.stages.append(_Blocks(dims, before, after, stride, BLOCKS[stage]))
            else:
                self.stages.append(nn.Sequential(_Convolutions(dims, before, after, stride, CONVOLUTIONS)))
            before = after

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(N, C, H, W)` or `(B, C, D, H, W)` -> one map per stage."""
        if self.stem is not None:
            x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class _Unit(nn.Module):
    """Convolution, instance norm, and leaky ReLU unless a sum follows."""

    def __init__(
        self, dims: int, before: int, after: int, kernel: int, stride: int, *, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = _CONV[dims](before, after, kernel, stride, kernel // 2, bias=kernel > 1)
        self.norm = _NORM[dims](after, eps=1e-5, affine=True)
        self.nonlin = nn.LeakyReLU(inplace=True) if active else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin(self.norm(self.conv(x)))


class _Convolutions(nn.Module):
    def __init__(self, dims: int, before: int, after: int, stride: int, count: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(_Unit(dims, after if i else before, after, 3, 1 if i else stride) for i in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class _Blocks(nn.Module):
    def __init__(self, dims: int, before: int, after: int, stride: int, count: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(_Block(dims, after if i else before, after, 1 if i else stride) for i in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class _Block(nn.Module):
    """Two convolutions; the shortcut averages where they stride and projects where they widen (ResNet-D)."""

    def __init__(self, dims: int, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _Unit(dims, before, after, 3, stride)
        self.conv2 = _Unit(dims, after, after, 3, 1, active=False)
        self.skip = nn.Sequential()
        if stride > 1:
            self.skip.append(_POOL[dims](stride, stride))
        if before != after:
            self.skip.append(_Unit(dims, before, after, 1, 1, active=False))
        self.nonlin2 = nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))
