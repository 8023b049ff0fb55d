"""The order of axes, defined once.

Inside medi3d every tensor is `(B, C, D, H, W)`. `D` is the depth of a volume and the time of a
clip: one axis, two names. Data is brought to this order where it is read (TorchIO has
(C, W, H, D), nibabel (X, Y, Z), SimpleITK arrays (Z, Y, X), decoded video (T, H, W, C));
nothing behind that border permutes.
"""

from collections.abc import Sequence

from medi3d.errors import ShapeError

DEPTH, HEIGHT, WIDTH = 2, 3, 4
"""Dimensions of the spatial axes in a `(B, C, D, H, W)` tensor."""

Triple = tuple[int, int, int]


def check_volume(shape: Sequence[int], channels: int) -> None:
    """Raise unless the shape is `(B, C, D, H, W)` with `channels` channels.

    Raises:
        ShapeError: it is not 5-D, an axis is empty, or it has another number of channels.
    """
    if len(shape) != 5 or shape[1] != channels or 0 in shape:
        raise ShapeError(
            f"this network takes (B, {channels}, D, H, W) with no empty axis, not {tuple(shape)}"
        )


def to_triple(value: int | Sequence[int], name: str = "value") -> Triple:
    """One integer for all axes, or three for (depth, height, width), as a triple.

    Raises:
        ShapeError: `value` is a sequence whose length is not 3.

    >>> to_triple(3), to_triple((1, 3, 3))
    ((3, 3, 3), (1, 3, 3))
    """
    if isinstance(value, int):
        return (value, value, value)
    if len(value) != 3:
        raise ShapeError(f"{name} is {tuple(value)}: give one number or three for (depth, height, width)")
    depth, height, width = (int(v) for v in value)
    return (depth, height, width)


def to_pair(value: int | Sequence[int], name: str = "value") -> tuple[int, int]:
    """One integer for both in-plane axes, or two for (height, width), as a pair.

    Raises:
        ShapeError: `value` is a sequence whose length is not 2.
    """
    if isinstance(value, int):
        return (value, value)
    if len(value) != 2:
        raise ShapeError(f"{name} is {tuple(value)}: give one number or two for (height, width)")
    height, width = (int(v) for v in value)
    return (height, width)
