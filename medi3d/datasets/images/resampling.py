"""Resample between grids with parallel axes: labels by the vote of their neighbours, probabilities in slabs.

All interpolation is linear and separable. Outside the source, its border voxels are repeated.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from scipy.ndimage import find_objects
from torch import Tensor

from medi3d.datasets.images.geometry import grid_difference

LABEL_VOXELS = 2**24
"""Target voxels for which labels are counted at once: 200 MB of float32 sums."""

SLAB_BYTES = 2**24
"""Number of probabilities held at once on the target's grid."""


class Taps(NamedTuple):
    """Positions of a target's voxels between those of a source, along one axis."""

    low: Tensor  # (n,) index of the lower neighbour
    high: Tensor  # (n,) of the upper one
    weight: Tensor  # (n,) share of the upper one

    def part(self, begin: int, end: int, origin: int = 0) -> "Taps":
        """For the target's voxels from `begin` to `end`, in a source cropped at `origin`."""
        return Taps(self.low[begin:end] - origin, self.high[begin:end] - origin, self.weight[begin:end])


def taps_between(source: sitk.Image, target: sitk.Image) -> tuple[Taps, Taps, Taps]:
    """Neighbours along depth, height and width; both images have the same direction."""
    start = source.TransformPhysicalPointToContinuousIndex(target.GetOrigin())
    found = []
    for axis in (2, 1, 0):
        count, last = target.GetSize()[axis], source.GetSize()[axis] - 1
        step = target.GetSpacing()[axis] / source.GetSpacing()[axis]
        places = (start[axis] + step * torch.arange(count, dtype=torch.float64)).clamp(0, last)
        places = torch.where((places - places.round()).abs() < 1e-6, places.round(), places)
        low = places.floor().long()
        found.append(Taps(low, (low + 1).clamp(max=last), (places - low).float()))
    depth, height, width = found
    return depth, height, width


def interpolate(values: Tensor, taps: tuple[Taps, Taps, Taps]) -> Tensor:
    """Interpolate `(..., D, H, W)` linearly at `taps`."""
    for dim, (low, high, weight) in zip((-3, -2, -1), taps, strict=True):
        if not weight.any() and len(low) == values.shape[dim] and torch.equal(low, torch.arange(len(low))):
            continue
        below = values.index_select(dim, low.to(values.device))
        if weight.any():
            above = values.index_select(dim, high.to(values.device))
            shape = [-1 if axis == dim else 1 for axis in (-3, -2, -1)]
            below.lerp_(above, weight.to(values).view(shape))
        values = below
    return values


def resample_labels(image: sitk.Image, grid: sitk.Image) -> sitk.Image:
    """Resample labels to a parallel grid: the value with the highest interpolated indicator.

    The result has no value that `image` lacks. Each label is interpolated within its own bounding box only,
    so that small organs in a large scan cost little.
    """
    found, numbers = _numbered(sitk.GetArrayViewFromImage(image))
    boxes = find_objects(numbers)
    depth, height, width = taps = taps_between(image, grid)
    across = len(height.low) * len(width.low)
    step = max(1, LABEL_VOXELS // across)
    voted = [
        _vote(numbers, boxes, (depth.part(first, first + step), *taps[1:]))
        for first in range(0, len(depth.low), step)
    ]
    resampled = sitk.GetImageFromArray(found[np.concatenate(voted)])
    resampled.CopyInformation(grid)
    return resampled


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values, 0 first, and for each voxel the index of its value."""
    if values.dtype.kind == "u" and values.itemsize <= 2:  # sorting all voxels takes 40 bytes for each
        present = np.zeros(2**16, bool)
        for plane in values:
            present[plane] = True
        present[0] = True
        found = np.flatnonzero(present)
        places = np.zeros(2**16, np.uint16)
        places[found] = np.arange(len(found))
        return found.astype(values.dtype), places[values]
    found, inverse = np.unique(values, return_inverse=True)
    if found[0] != 0:
        found, inverse = np.append(0, found).astype(found.dtype), inverse + 1
    return found, inverse.reshape(values.shape).astype(np.uint16 if len(found) < 2**16 else np.int32)


def _vote(numbers: np.ndarray, boxes: list[tuple[slice, ...]], taps: tuple[Taps, Taps, Taps]) -> np.ndarray:
    """Index of the strongest label at each voxel, 0 where background is stronger than all of them."""
    shape = [len(along.low) for along in taps]
    best, total = torch.zeros(shape), torch.zeros(shape)
    winner = torch.zeros(shape, dtype=torch.int32)
    for number, box in enumerate(boxes, start=1):
        reached = [_reached(along, side) for along, side in zip(taps, box, strict=True)]
        if any(begin >= end for begin, end in reached):
            continue
        crop = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
        indicator = torch.from_numpy((numbers[crop] == number).astype(np.float32))
        near = [a.part(*r, c.start) for a, r, c in zip(taps, reached, crop, strict=True)]
        share = interpolate(indicator, (near[0], near[1], near[2]))
        place = tuple(slice(*r) for r in reached)
        total[place] += share
        winner[place] = torch.where(share > best[place], number, winner[place])
        best[place] = torch.maximum(share, best[place])
    return torch.where(1 - total > best, 0, winner).numpy()


def _reached(along: Taps, side: slice) -> tuple[int, int]:
    """Target voxels between `side.start - 1` and `side.stop`, on which a label in `side` has an influence."""
    inside = (along.high >= side.start) & (along.low < side.stop)
    places = inside.nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def restored_slabs(slabs: Iterable[Tensor], source: sitk.Image, target: sitk.Image) -> Iterator[Tensor]:
    """Resample probabilities from the source's grid to the target's, a few slices at a time.

    Args:
        slabs: `(classes, s, h, w)`, the source's slices from the first to the last.
        source: Its grid.
        target: The other grid, of the same direction.

    Yields:
        `(classes, t, H, W)`, the target's slices from the first to the last; t depends only on the
        classes and the target.
    """
    depth, height, width = taps_between(source, target)
    held: list[Tensor] = []
    first = end = done = 0  # first slice held, slices received, target slices given out
    for slab in slabs:
        held.append(slab)
        end += slab.shape[1]
        step = _slices_at_once(slab.shape[0], target)
        while done < len(depth.low):
            until = min(done + step, len(depth.low))
            if int(depth.high[until - 1]) >= end:
                break
            values = torch.cat(held, dim=1) if len(held) > 1 else held[0]
            begin = int(depth.low[done])
            values = values[:, begin - first :]
            held, first = [values], begin
            needed = values[:, : int(depth.high[until - 1]) - first + 1]
            yield interpolate(needed, (depth.part(done, until, first), height, width))
            done = until


def _slices_at_once(classes: int, target: sitk.Image) -> int:
    width, height, _ = target.GetSize()
    return max(1, SLAB_BYTES // (4 * classes * width * height))


def to_lps(image: sitk.Image) -> sitk.Image:
    """Orient `image` to LPS; return it uncopied if it is already (`DICOMOrient` would copy it)."""
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    return image if code == "LPS" else sitk.DICOMOrient(image, "LPS")


def turned_like(mask: sitk.Image, original: sitk.Image) -> sitk.Image:
    """Permute and flip a mask's axes to those of `original`."""
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(original.GetDirection())
    turned = sitk.DICOMOrient(mask, code)
    if grid_difference(turned, original):  # at exactly 45 degrees an axis has two names
        turned = sitk.Resample(mask, original, sitk.Transform(), sitk.sitkNearestNeighbor)
    turned.CopyInformation(original)  # exactly
    return turned


def oriented_grid(original: sitk.Image) -> sitk.Image:
    """The grid of `original` oriented to LPS, without its voxels."""
    return to_lps(empty_like(original))


def empty_like(image: sitk.Image) -> sitk.Image:
    """The grid of `image`, without its voxels: one byte each."""
    grid = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    grid.CopyInformation(image)
    return grid
