"""Patches of one size out of volumes of any size, more often than not around what is labelled."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from medi3d.axes import to_triple
from medi3d.errors import ConfigError, ShapeError


def sample_patch(sample: Mapping[str, Any], size: Sequence[int], foreground: float) -> dict[str, Any]:
    """Cut a random patch out of a sample; all other entries are passed on.

    Where the volume is smaller than the patch it lies at a random place inside: the image is
    continued by its border voxels, the label by background. Everything is drawn from torch's RNG.

    Args:
        sample: "image" (C, D, H, W) and, if there is one, "label" (1, D, H, W).
        size: (depth, height, width) in voxels.
        foreground: Probability that the patch is centred on a labelled voxel, as far as the volume
            reaches: each label that is present is as likely, then each of its voxels.

    Returns:
        The sample with "image" (C, *size) and "label" (1, *size).

    Raises:
        ShapeError: `size` is not three numbers, or the image is not (C, D, H, W).
        ConfigError: `foreground` is not between 0 and 1.
    """
    image, label = sample["image"], sample.get("label")
    if image.ndim != 4:
        raise ShapeError(f"the image has shape {tuple(image.shape)}; expected (C, D, H, W)")
    if not 0 <= foreground <= 1:
        raise ConfigError(f"foreground is {foreground}: a part between 0 and 1")
    wanted = to_triple(size, "patch size")
    start = [_any_start(n, side) for n, side in zip(image.shape[1:], wanted, strict=True)]
    if label is not None and torch.rand(()) < foreground and label.any():
        voxel = _labelled_voxel(label[0])
        start = [_start_around(v, n, s) for v, n, s in zip(voxel, image.shape[1:], wanted, strict=True)]
    patch = {**sample, "image": _cut(image, start, wanted)}
    if label is not None:
        patch["label"] = _cut(label, start, wanted) * _inside(label, start, wanted)
    return patch


def _any_start(length: int, side: int) -> int:
    """A random first voxel, negative where the patch is longer than the volume."""
    low, high = sorted((0, length - side))
    return int(torch.randint(low, high + 1, ()))


def _start_around(voxel: int, length: int, side: int) -> int:
    low, high = sorted((0, length - side))
    return min(max(voxel - side // 2, low), high)


def _labelled_voxel(label: torch.Tensor) -> list[int]:
    counts = torch.bincount(label.flatten())[1:]
    value = 1 + int(torch.multinomial((counts > 0).float(), 1))
    voxels = (label == value).nonzero()
    return [int(place) for place in voxels[torch.randint(len(voxels), ())]]


def _cut(tensor: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    for axis, (first, side) in enumerate(zip(start, size, strict=True), 1):
        index = torch.arange(first, first + side).clamp(0, tensor.shape[axis] - 1)
        tensor = tensor.index_select(axis, index)
    return tensor


def _inside(tensor: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """1 where the patch lies on the volume, 0 beyond it; of the tensor's type."""
    inside = torch.zeros((1, *size), dtype=tensor.dtype)
    cut = [
        slice(max(0, -first), min(side, n - first))
        for first, side, n in zip(start, size, tensor.shape[1:], strict=True)
    ]
    inside[:, cut[0], cut[1], cut[2]] = 1
    return inside
