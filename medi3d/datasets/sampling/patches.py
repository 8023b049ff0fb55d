"""Cut patches of one size from volumes of any size, preferably around labelled voxels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from medi3d.axes import to_triple
from medi3d.errors import ConfigError, ShapeError

PLACES = 10_000
"""Most voxels of each label that are kept, as centres of patches."""


def sample_patch(sample: Mapping[str, Any], size: Sequence[int], foreground: float) -> dict[str, Any]:
    """Cut a random patch out of a sample; all other entries are passed on.

    A volume smaller than the patch is placed in it at random: the image is padded with its border
    voxels, the label with background. Everything is drawn from torch's RNG.

    Args:
        sample: "image" (C, D, H, W) and, if there is one, "label" (1, D, H, W); "places", the voxels of
            each label as `labelled_voxels` gives them, spares the search for them.
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
    if label is not None and torch.rand(()) < foreground and (voxel := _labelled_voxel(sample)):
        start = [_start_around(v, n, s) for v, n, s in zip(voxel, image.shape[1:], wanted, strict=True)]
    patch = {**sample, "image": _cut(image, start, wanted)}
    patch.pop("places", None)
    if label is not None:
        patch["label"] = _cut(label, start, wanted) * _inside(label, start, wanted)
    return patch


def cut_patch(sample: Mapping[str, Any], size: Sequence[int], centre: Sequence[int]) -> dict[str, Any]:
    """Cut the patch around a voxel, shifted to stay within the volume; padded as in `sample_patch`.

    Args:
        sample: "image" (C, D, H, W), "label" (1, D, H, W), or both; all other entries are passed on.
        size: (depth, height, width) in voxels.
        centre: A voxel (depth, height, width).
    """
    wanted = to_triple(size, "patch size")
    cut = {key: sample[key] for key in ("image", "label") if key in sample}
    extent = next(iter(cut.values())).shape[1:]
    start = [_start_around(v, n, s) for v, n, s in zip(centre, extent, wanted, strict=True)]
    patch = {**sample, **{key: _cut(tensor, start, wanted) for key, tensor in cut.items()}}
    if "label" in cut:
        patch["label"] = patch["label"] * _inside(cut["label"], start, wanted)
    return patch


def _any_start(length: int, side: int) -> int:
    """A random first voxel, negative where the patch is longer than the volume."""
    low, high = sorted((0, length - side))
    return int(torch.randint(low, high + 1, ()))


def _start_around(voxel: int, length: int, side: int) -> int:
    low, high = sorted((0, length - side))
    return min(max(voxel - side // 2, low), high)


def _labelled_voxel(sample: Mapping[str, Any]) -> list[int]:
    """The voxels of a random label among those present; empty if there is none."""
    voxels = sample["places"] if "places" in sample else labelled_voxels(sample["label"])
    present = torch.tensor([float(len(some) > 0) for some in voxels])
    if not present.any():
        return []
    chosen = voxels[int(torch.multinomial(present, 1))]
    return [int(place) for place in chosen[torch.randint(len(chosen), ())]]


def labelled_voxels(label: torch.Tensor, at_most: int | None = None) -> list[torch.Tensor]:
    """Positions (depth, height, width) of the voxels of label 1, 2, ...: int16 tensors (n, 3).

    Args:
        label: (1, D, H, W).
        at_most: Most voxels of each label, evenly spaced in memory; None: all.
    """
    found = label[0].nonzero()  # one pass over the volume; the labelled part of it is small
    values = label[0][tuple(found.T)]
    places = [found[values == value].to(torch.int16) for value in range(1, int(label.max()) + 1)]
    if at_most is None:
        return places
    return [some[torch.linspace(0, len(some) - 1, min(len(some), at_most)).long()] for some in places]


def _cut(tensor: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """A copy of the patch; of a memory-mapped file only the patch is read."""
    inside = [(max(f, 0), min(f + s, n)) for f, s, n in zip(start, size, tensor.shape[1:], strict=True)]
    patch = tensor[:, *(slice(low, high) for low, high in inside)]
    if patch.shape[1:] == tuple(size):
        return patch.clone(memory_format=torch.contiguous_format)
    for axis, (first, side, (low, high)) in enumerate(zip(start, size, inside, strict=True), 1):
        patch = patch.index_select(axis, torch.arange(first, first + side).clamp(low, high - 1) - low)
    return patch


def _inside(tensor: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """1 where the patch lies on the volume, 0 beyond it; of the tensor's type."""
    inside = torch.zeros((1, *size), dtype=tensor.dtype)
    cut = [
        slice(max(0, -first), min(side, n - first))
        for first, side, n in zip(start, size, tensor.shape[1:], strict=True)
    ]
    inside[:, cut[0], cut[1], cut[2]] = 1
    return inside
