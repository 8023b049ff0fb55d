"""Rules for pools and anti-aliased down-sampling: the 2D layer as it is, then the same along depth."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.axes import to_pair
from medi3d.inflation.fold import Fold, merge_depth, pad_depth, split_depth
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.base import Kind, Rule, register_rule

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers import BlurPool2d  # noqa: E402


class PoolRule(Rule):
    """A pool: the 2D layer as it is, then the same pool along depth.

    Max and mean are separable, so in-plane options (ceil mode, whether padding counts, "same") come
    with the 2D layer. Along depth a pool never counts padding: the end slices are repeated, which
    for a maximum is the same as leaving them out.
    """

    def __init__(self, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__(layer, depth, fold, profile)
        self.layer = layer

    @staticmethod
    def combine(windows: list[Tensor]) -> Tensor:
        """Join the taps of a window."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D, C, H, W)` -> `(B·D', C, H', W')`."""
        x = self.layer(x)
        if self.depth.kernel == self.depth.stride == 1:
            return x
        volume = split_depth(x, self.fold.batch, self.multiplicity)
        reach = (self.depth.kernel - 1) * self.depth.dilation
        volume = pad_depth(volume, *self.depth_padding(volume.shape[2]), "replicate")
        reach = min(reach, volume.shape[2] - 1)  # a valid window longer than the clip is the whole clip
        taps = range(0, reach + 1, self.depth.dilation)
        end = volume.shape[2] - reach
        out = self.combine([volume[:, :, tap : end + tap : self.depth.stride] for tap in taps])
        return merge_depth(out, self.fold.batch, self.multiplicity)


@register_rule(nn.MaxPool2d)
class MaxPoolRule(PoolRule):
    """A maximum over space is the maximum over depth of the maxima in-plane."""

    kind: ClassVar[Kind] = "max_pool"

    @staticmethod
    def combine(windows: list[Tensor]) -> Tensor:
        """Maximum over the taps."""
        out = windows[0]
        for window in windows[1:]:
            out = torch.maximum(out, window)
        return out


@register_rule(nn.AvgPool2d)
class AvgPoolRule(PoolRule):
    """A mean over space is the mean over depth of the means in-plane."""

    kind: ClassVar[Kind] = "avg_pool"

    @staticmethod
    def combine(windows: list[Tensor]) -> Tensor:
        """Mean over the taps."""
        out = windows[0]
        for window in windows[1:]:
            out = out + window
        return out / len(windows)


@register_rule(BlurPool2d)
class BlurPoolRule(AvgPoolRule):
    """Anti-aliased down-sampling (Zhang 2019): the 2D blur, then a box of equal width along depth."""

    kind: ClassVar[Kind] = "resample"

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Filter size and stride of the blur."""
        return to_pair(layer.filt_size), to_pair(layer.stride), (1, 1)  # type: ignore[arg-type]
