"""Measure whether an encoder's maps match its strides, before a decoder is built on them."""

from typing import Any

from torch import nn

from medi3d.axes import DEPTH, Triple
from medi3d.errors import ShapeError
from medi3d.inflation.image_sizes import dry_run
from medi3d.models.encoder import as_encoder

SMALLEST = 16
"""Smallest volume size that is tried, in voxels: on less, kernels without padding have no output."""

Sizes = list[tuple[int, ...]]


def check_strides(encoder: nn.Module) -> None:
    """Run an encoder on volumes of two or three sizes and compare its maps with its `strides`.

    A map of stride s gains one position per s voxels along that axis. A map with a fixed size, or with
    another stride than declared, would be misaligned with the others.

    Raises:
        ShapeError: a map does not have its declared stride.
    """
    strides = list(as_encoder(encoder).strides)
    coarsest = [max(axis) for axis in zip(*strides, strict=True)]
    least = [c * max(2, -(-SMALLEST // c)) for c in coarsest]
    size = (least[0], *(s + c for s, c in zip(least[1:], coarsest[1:], strict=True)))
    maps = _sizes_of_maps(encoder, size)
    if maps is None or maps == [_divided(size, stride) for stride in strides]:
        return
    if len(maps) != len(strides):
        raise ShapeError(f"the encoder declares {len(strides)} strides and returns {len(maps)} maps")
    larger = tuple(s + c for s, c in zip(size, coarsest, strict=True))
    grown = _sizes_of_maps(encoder, larger)
    for number, (stride, small) in enumerate(zip(strides, maps, strict=True)):
        gained = None if grown is None else tuple(b - a for a, b in zip(small, grown[number], strict=True))
        if gained != _divided(coarsest, stride):
            raise ShapeError(
                f"level {number + 1} of the encoder declares the stride {stride} (depth, height, width), but "
                f"a volume of {size} voxels gives {small} positions, not {_divided(size, stride)}"
            )


def _divided(size: Any, stride: Triple) -> tuple[int, ...]:
    return tuple(s // t for s, t in zip(size, stride, strict=True))


def _sizes_of_maps(encoder: nn.Module, size: tuple[int, ...]) -> Sizes | None:
    """Depth, height and width of each map for a volume of that size; None if it is too small."""
    shapes = dry_run(encoder, size)
    return None if shapes is None else [tuple(shape[DEPTH:]) for shape in shapes]
