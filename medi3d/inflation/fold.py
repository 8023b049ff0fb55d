"""Folded execution: the 2D network runs on slices, a few layers unfold depth for their 3D work.

    (B, C, D, H, W)  ─fold─►  (B·D, C, H, W)  ─unmodified 2D code─►  (B·D', C', H', W')  ─unfold─►

Every line of the 2D network that is not a convolution, pool or resampling acts on each slice
alone, and is right as it stands. Where depth matters, the only thing a layer must know is B: then
D = N / B at any point, also after a stride along depth. In channels-last memory folding and
unfolding are views and cost nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from medi3d.errors import ShapeError


class Fold:
    """The batch size of the volume now running through one network. Shared by all its layers."""

    def __init__(self) -> None:
        self.batch = 1
        self.tubelet = 1
        """Slices that are grouped into channels at the entry, see `TubeletRule`."""
        self.height = 0
        """Height of the volume in voxels."""
        self.in_pool = False
        """Whether a rule is running its 2D pool, see `FunctionalPools`."""

    @contextmanager
    def pooling(self) -> Iterator[None]:
        """While a rule runs its 2D pool."""
        before, self.in_pool = self.in_pool, True
        try:
            yield
        finally:
            self.in_pool = before

    def fold(self, volume: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> `(B·D, C, H, W)`, and remember B; with tubelets `(B·D/r, C·r, H, W)`.

        Raises:
            ShapeError: `volume` is not 5-D or has an empty axis.
        """
        if volume.dim() != 5 or 0 in volume.shape:
            raise ShapeError(
                f"an inflated network takes (B, C, D, H, W) with no empty axis, not {tuple(volume.shape)}"
            )
        self.batch, self.height = volume.shape[0], volume.shape[3]
        if self.tubelet == 1:
            return volume.transpose(1, 2).flatten(0, 1)
        volume = pad_depth(volume, 0, -volume.shape[2] % self.tubelet, "replicate")
        grouped = volume.unflatten(2, (-1, self.tubelet))  # (B, C, D/r, r, H, W)
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def ungroup(self, grouped: Tensor) -> Tensor:
        """Tubelets back into slices: `(B·D/r, C·r, H, W)` -> `(B·D, C, H, W)`."""
        return grouped.unflatten(1, (-1, self.tubelet)).transpose(1, 2).flatten(0, 1)

    def unfold(self, output: Any) -> Any:
        """Bring depth back into every tensor of a network's output, to dimension 2.

        `(B·D, C, H, W)` -> `(B, C, D, H, W)`, `(B·D, C)` -> `(B, C, D)`.

        Raises:
            ShapeError: the output is not made of tensors, or mixes the batch.
        """
        if isinstance(output, Tensor):
            if output.shape[0] % self.batch:
                raise ShapeError(
                    f"the 2D network returned {tuple(output.shape)} for a batch of {self.batch} volumes: "
                    "it mixes the batch, and its slices cannot be told apart"
                )
            return output.unflatten(0, (self.batch, -1)).movedim(1, 2)
        if isinstance(output, dict):
            return {key: self.unfold(value) for key, value in output.items()}
        if isinstance(output, (list, tuple)):
            return [self.unfold(value) for value in output]
        raise ShapeError(
            f"the 2D network returned {type(output).__name__}; tensors, lists and dicts can be unfolded"
        )


def split_depth(x: Tensor, batch: int, multiplicity: int = 1) -> Tensor:
    """`(B·D·q, C, H, W)` -> `(B·q, C, D, H, W)`; q: items (heads, windows) of a slice in the batch."""
    if multiplicity == 1:
        return x.unflatten(0, (batch, -1)).transpose(1, 2)
    return x.unflatten(0, (batch, -1, multiplicity)).transpose(1, 2).flatten(0, 1).transpose(1, 2)


def merge_depth(x: Tensor, batch: int, multiplicity: int = 1) -> Tensor:
    """Undo `split_depth`."""
    x = x.transpose(1, 2)
    if multiplicity == 1:
        return x.flatten(0, 1)
    return x.unflatten(0, (batch, multiplicity)).transpose(1, 2).flatten(0, 2)


def pad_depth(x: Tensor, before: int, after: int, mode: str) -> Tensor:
    """Add slices at both ends of `(B, C, D, H, W)`: copies of the end slice (`replicate`), or `zeros`.

    A negative number drops slices. Slices are joined one by one, which keeps channels-last memory.
    """
    if before < 0 or after < 0:
        x = x[:, :, max(-before, 0) : x.shape[2] - max(-after, 0)]
    first, last = x[:, :, :1], x[:, :, -1:]
    if mode == "zeros":
        first = last = torch.zeros_like(first)
    slices = [first] * before + [x] + [last] * after
    return torch.cat(slices, dim=2) if len(slices) > 1 else x
