"""A U-Net decoder for any encoder: built from the encoder's declared channels and strides.

U-Net: Ronneberger et al. 2015 (arXiv:1505.04597); in 3D: Çiçek et al. 2016 (arXiv:1606.06650).
Blocks are MONAI's (`UnetBasicBlock`: convolution, norm, leaky ReLU, twice).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from monai.networks.blocks.dynunet_block import UnetBasicBlock
from torch import Tensor, nn

from medi3d.axes import DEPTH, Triple, to_triple
from medi3d.errors import ShapeError


class Decoder(nn.Module):
    """From coarse to fine: reduce channels, enlarge, join the encoder's map of that size, convolve twice.

    If the encoder's first map is coarser than the input, more steps join a shallow branch that sees the input
    itself, so that the output has the input's resolution, unless `full_resolution` is off. One step enlarges
    at most four-fold: for a vision transformer, whose maps have stride 16, the branch has maps at 1 and 4.

    Args:
        in_channels: channels of the input volume.
        encoder_channels: channels of each encoder level, fine to coarse.
        encoder_strides: voxels per position of each level, (depth, height, width).
        channels: channels of each decoder level, fine to coarse; one number per level but the deepest, those
            of the input branch included.
        norm: "instance", "batch" or "group", as MONAI names them.
        full_resolution: continue to the input's resolution, with that branch; False: the first map has the
            resolution of the encoder's.

    Raises:
        ShapeError: strides do not grow, there is only one, or `channels` has the wrong length.
    """

    def __init__(
        self,
        in_channels: int,
        encoder_channels: Sequence[int],
        encoder_strides: Sequence[Triple],
        channels: Sequence[int] | None = None,
        norm: str = "instance",
        full_resolution: bool = True,
    ) -> None:
        super().__init__()
        skips, strides = list(encoder_channels), [to_triple(s) for s in encoder_strides]
        self.has_input_branch = full_resolution and strides[0] != (1, 1, 1)
        detail = _detail_strides(strides[0]) if self.has_input_branch else []
        skips, strides = [in_channels] * len(detail) + skips, detail + strides
        self.ratios = _ratios(strides)
        if not self.ratios:
            raise ShapeError(
                f"a decoder needs two resolutions or more; there is only one, of stride {strides[0]}: "
                "use more levels of the encoder, or the head convolution"
            )
        widths = list(channels or default_channels(strides))
        if len(widths) != len(self.ratios):
            raise ShapeError(
                f"this decoder has {len(self.ratios)} levels (strides {strides}), "
                f"but {len(widths)} channel numbers {widths} are given"
            )
        self.out_channels, self.finest = widths, strides[0]
        kernels = [_kernel(stride, ratio) for stride, ratio in zip(strides, self.ratios, strict=False)]
        if self.has_input_branch:
            self.input_branch = UnetBasicBlock(
                3, in_channels, widths[0], kernels[0], 1, norm_name=_norm(norm, widths[0])
            )
            skips[: len(detail)] = widths[: len(detail)]
        self.detail = nn.ModuleList(
            UnetBasicBlock(3, widths[k - 1], widths[k], kernels[k], 1, norm_name=_norm(norm, widths[k]))
            for k in range(1, len(detail))
        )
        below = [*widths[1:], skips[-1]]
        self.reduce = nn.ModuleList(nn.Conv3d(b, w, 1) for b, w in zip(below, widths, strict=True))
        self.join = nn.ModuleList(
            UnetBasicBlock(3, w + s, w, k, 1, norm_name=_norm(norm, w))
            for w, s, k in zip(widths, skips, kernels, strict=False)
        )

    def forward(self, volume: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of every decoder level, fine to coarse; the first has the volume's size, or the encoder's.

        Args:
            volume: `(B, C, D, H, W)`, the encoder's input.
            features: the encoder's maps, fine to coarse.
        """
        skips = [*self._details(volume), *features]
        x = skips[-1]
        maps: list[Tensor] = []
        for level in reversed(range(len(self.join))):
            x = self.reduce[level](x)
            if max(self.ratios[level]) > 1:
                x = F.interpolate(x, scale_factor=self.ratios[level], mode="trilinear")
            x = self.join[level](torch.cat([fit(x, skips[level].shape[DEPTH:]), skips[level]], dim=1))
            maps.insert(0, x)
        return maps

    def _details(self, volume: Tensor) -> list[Tensor]:
        """Maps of the input branch, fine to coarse; each coarser map sees means of the one before."""
        if not self.has_input_branch:
            return []
        maps = [self.input_branch(volume)]
        for block, ratio in zip(self.detail, self.ratios, strict=False):
            size = [int(step) for step in ratio]
            maps.append(block(F.avg_pool3d(maps[-1], size, ceil_mode=True)))
        return maps


class SubpixelHead(nn.Module):
    """Class logits of all voxels that a map position covers, from one 1×1×1 convolution.

    Sub-pixel convolution: Shi et al. 2016 (arXiv:1609.05158), in 3D. At initialisation all voxels of a
    position get the same logits (as in ICNR, Aitken et al. 2017, arXiv:1707.02937).

    Args:
        channels: channels of the map.
        num_classes: logits per voxel.
        stride: voxels per position, (depth, height, width).
    """

    def __init__(self, channels: int, num_classes: int, stride: Triple) -> None:
        super().__init__()
        self.stride, self.num_classes = stride, num_classes
        voxels = math.prod(stride)
        self.convolution = nn.Conv3d(channels, num_classes * voxels, 1)
        with torch.no_grad():
            for parameter in self.convolution.parameters():
                parameter.copy_(parameter[::voxels].repeat_interleave(voxels, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> `(B, num_classes, D·stride, H·stride, W·stride)`."""
        logits = self.convolution(x)
        depth, height, width = logits.shape[DEPTH:]
        inside = logits.view(-1, self.num_classes, *self.stride, depth, height, width)
        d, h, w = self.stride
        return inside.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(
            -1, self.num_classes, depth * d, height * h, width * w
        )


def default_channels(strides: Sequence[Triple]) -> list[int]:
    """16 at full resolution, 32 at half, 64, 96 and at most 128 below."""
    by_level = (16, 32, 64, 96, 128)
    fine = [max(stride).bit_length() - 1 for stride in strides[:-1]]
    return [by_level[min(level, 4)] for level in fine]


def fit(x: Tensor, size: Sequence[int]) -> Tensor:
    """Crop `(B, C, D, H, W)` at its far ends, or repeat them, to that (depth, height, width).

    Strided layers start at the first voxel, so sizes that the stride does not divide differ at the far end
    only.
    """
    have = x.shape[DEPTH:]
    if any(h < s for h, s in zip(have, size, strict=True)):
        missing = [max(s - h, 0) for h, s in zip(have, size, strict=True)]
        x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
    if not torch.compiler.is_compiling():
        return x[:, :, : size[0], : size[1], : size[2]]
    for axis, extent in enumerate(size, start=DEPTH):  # a view would make exporters compare sizes
        x = x.index_select(axis, torch.arange(extent, device=x.device))
    return x


def _ratios(strides: Sequence[Triple]) -> list[tuple[float, ...]]:
    ratios = []
    for fine, coarse in pairwise(strides):
        if any(c < f or c % f for f, c in zip(fine, coarse, strict=True)):
            raise ShapeError(
                f"strides must grow by whole factors from level to level, not {fine} -> {coarse}"
            )
        ratios.append(tuple(float(c // f) for f, c in zip(fine, coarse, strict=True)))
    return ratios


def _detail_strides(first: Triple) -> list[Triple]:
    """Strides of the input branch before an encoder's first map, fine to coarse: steps of 4 where they fit.

    >>> _detail_strides((4, 4, 4)), _detail_strides((16, 16, 16)), _detail_strides((1, 8, 8))
    ([(1, 1, 1)], [(1, 1, 1), (4, 4, 4)], [(1, 1, 1), (1, 2, 2)])
    """
    strides: list[Triple] = []
    stride = first
    while max(stride) > 4:
        finer = tuple(s // 4 if s % 4 == 0 else s // 2 if s % 2 == 0 else s for s in stride)
        if finer == stride:  # 7: one step is enough
            break
        stride = to_triple(finer)
        strides.insert(0, stride)
    return strides if strides[:1] == [(1, 1, 1)] else [(1, 1, 1), *strides]


def _kernel(stride: Triple, ratio: tuple[float, ...]) -> Triple:
    """3 along each axis; 1 along depth while the encoder delays depth strides (anisotropic voxels)."""
    held = stride[0] < max(stride) or (stride[0] == 1 and ratio[0] == 1)
    return (1 if held else 3, 3, 3)


def _norm(name: str, channels: int) -> tuple[str, dict[str, object]]:
    if name == "group":
        return ("group", {"num_groups": min(8, channels)})
    return (name, {"affine": True})
