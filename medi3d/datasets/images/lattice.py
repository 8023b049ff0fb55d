"""Map a mask onto the voxels of its image exactly, without interpolation."""

from itertools import product

import numpy as np
import SimpleITK as sitk

from medi3d.datasets.images.geometry import GRID_TOLERANCE, grid_difference
from medi3d.datasets.images.resampling import to_lps
from medi3d.errors import DataError


def on_grid_of(mask: sitk.Image, image: sitk.Image, *, cropped: bool = False) -> sitk.Image:
    """Put a mask whose voxels are voxels of the image on the image's grid.

    Its axes may have another order or other signs, and it may be cropped or padded; voxels that it lacks
    are 0. A mask of the image's size must lie where the image does: one that is shifted as a whole lost
    its header. One that is shorter along a single axis may have lost slices, and is refused unless the
    file says that it is cropped.

    Args:
        mask: Integers, one value per voxel.
        image: The image that it belongs to; its voxels are not used.
        cropped: The file says that it is cropped, so no slices are lost.

    Raises:
        DataError: The voxels are not those of the image, or labelled ones lie outside it.
    """
    if not grid_difference(mask, image):
        mask = sitk.Image(mask)  # a copy that shares the voxels: the caller's geometry stays as it is
        mask.CopyInformation(image)
        return mask
    turn, start = _turn(mask, image)
    order = np.abs(turn).argmax(axis=1)  # along axis i of the image runs axis order[i] of the mask
    voxels = sitk.GetArrayViewFromImage(mask).T.transpose(order)
    last = np.array(voxels.shape) - 1
    for axis in range(3):
        if turn[axis, order[axis]] < 0:
            voxels = np.flip(voxels, axis)
            start[axis] -= last[axis]
    size = np.array(image.GetSize())
    if tuple(size) == voxels.shape and start.any():
        raise DataError(_words(mask, image))
    low, high = np.maximum(start, 0), np.minimum(start + voxels.shape, size)
    inside = voxels[tuple(slice(a, max(a, b)) for a, b in zip(low - start, high - start, strict=True))]
    lost = int(np.count_nonzero(voxels)) - int(np.count_nonzero(inside))
    if lost:
        raise DataError(f"{lost} labelled voxels lie outside of the image")
    if not cropped and np.count_nonzero((low > 0) | (high < size)) == 1:
        raise DataError(f"{_words(mask, image)}; are slices missing? If they hold no label, fill them with 0")
    placed = np.zeros(size, voxels.dtype)
    if inside.size:
        placed[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = inside
    result = sitk.GetImageFromArray(np.ascontiguousarray(placed.T))
    result.CopyInformation(image)
    return result


def _turn(mask: sitk.Image, image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) of 0, 1 and -1, and (3,): the image's index of a voxel of the mask is turn @ index + start."""
    ours, theirs = (
        np.reshape(one.GetDirection(), (3, 3)) * np.array(one.GetSpacing()) for one in (image, mask)
    )
    exact = np.linalg.solve(ours, theirs)
    offset = np.array(image.TransformPhysicalPointToContinuousIndex(mask.GetOrigin()))
    turn, start = np.rint(exact).astype(int), np.rint(offset).astype(int)
    ends = np.array(list(product(*((0, side - 1) for side in mask.GetSize()))))
    apart = np.linalg.norm((ends @ (exact - turn).T + offset - start) @ ours.T, axis=1).max()
    once = (np.abs(turn).sum(axis=0) == 1).all() and (np.abs(turn).sum(axis=1) == 1).all()
    if not once or apart > GRID_TOLERANCE * min(*mask.GetSpacing(), *image.GetSpacing()):
        raise DataError(_words(mask, image))
    return turn, start


def _words(mask: sitk.Image, image: sitk.Image) -> str:
    """Compared as oriented: another order of axes is not a difference."""
    words = grid_difference(to_lps(mask), to_lps(image)) or grid_difference(mask, image)
    if mask.GetSize() == image.GetSize():
        words += "; if its header was lost and the voxels are the image's, copy the image's header"
    return words
