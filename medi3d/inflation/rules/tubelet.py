"""Stems of networks that must not step along depth later: the whole stride is taken at the entry."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from medi3d.errors import PlanError
from medi3d.inflation.fold import Call, Fold
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.base import adopt
from medi3d.inflation.rules.convolution import ConvRule


class TubeletRule(ConvRule):
    """A patchify convolution that takes its slices as channels (tubelets: Arnab et al. 2021, ViViT).

    Many vision transformers read the batch size before their patch embedding and use it after; a
    stride along depth in between would change it unnoticed. So the fold groups r slices into
    channels at the entry, and this convolution with its r taps is exactly the 3D one with kernel and
    stride (r, k, k): the network's batch is B·D/r from the first line on.
    """

    def __init__(
        self, layer: nn.Conv2d, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> None:
        super().__init__(layer, depth, fold, profile, channels)
        fold.tubelet = depth.stride

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether patches do not overlap and see all channels."""
        kernel, stride, _ = cls.geometry_of(layer)
        return kernel == stride and bool(layer.groups == 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D/r, C·r, H, W)` -> `(B·D/r, O, H', W')`."""
        x, padding = self._pad_in_plane(x)
        if self.along_depth is not None:  # each slice alone, then the r slices of a tubelet
            x = x.unflatten(1, (-1, self.depth.stride)).transpose(1, 2).flatten(0, 1)
        weight = self.kernel().flatten(1, 2)
        out = F.conv2d(x, weight, self.bias, self.stride_2d, padding, self.dilation_2d)
        if self.along_depth is None:
            return out
        tubelets = out.unflatten(0, (-1, self.depth.stride)).transpose(1, 2)  # (B·D/r, O, r, H', W')
        return self.along_depth(tubelets, self.depth).squeeze(2)


class HoistedStem(nn.Module):
    """A stem of any layers that takes its slices as channels: tubelets where patches overlap.

    As with `TubeletRule`, the network around it has the batch B·D/r from the first line on. The stem
    separates the r slices of a tubelet again and runs its 3D layers unchanged. Their steps
    along depth leave B·D/r slices: exact because regrouping is undone to the last bit.
    """

    fold: Fold

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`(B·D/r, C·r, H, W)` -> the stem's output for `(B·D, C, H, W)`, with B·D/r rows."""
        return super().forward(self.fold.ungroup(x), *args, **kwargs)


@torch.no_grad()
def hoist(stem: nn.Module, fold: Fold, channels: int, size: tuple[int, int]) -> None:
    """Move the steps of an inflated stem to the network's entry, in place.

    Args:
        channels: of the volume.
        size: height and width of an image that the stem takes.

    Raises:
        PlanError: the steps of the stem are not powers of two.
    """
    parameter = next(stem.parameters())
    slices = 2 * _LARGEST
    training = stem.training
    volume = parameter.new_zeros(slices, channels, *size)
    with fold.running(Call(batch=1, height=size[0], depth=slices)):
        rows = tree_leaves(stem.eval()(volume))[0].shape[0]
    stem.train(training)
    if slices % rows:
        raise PlanError(f"the stem leaves {rows} of {slices} slices: its steps must be powers of two")
    fold.tubelet = slices // rows
    stem.fold = fold  # type: ignore[assignment]
    adopt(stem, HoistedStem)


_LARGEST = 16
"""The largest step along depth that a stem is expected to take, in slices."""
