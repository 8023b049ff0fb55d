"""From a scan to the array that a network takes, and a mask's way back.

Orient to LPS, resample if a spacing is asked for, normalise. Where the scan already has that
spacing nothing is interpolated: axes are permuted and flipped, which loses nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import torch

from medi3d.datasets.images.files import read_channels, smallest_type
from medi3d.datasets.images.geometry import grid_difference, spacing_dhw
from medi3d.datasets.images.resampling import empty_like, oriented_grid, resample_labels, to_lps, turned_like
from medi3d.datasets.images.settings import Normalisation, VolumeSettings
from medi3d.errors import DataError, ShapeError

SPACING_TOLERANCE = 1e-3
"""Spacings (mm) closer than this are equal: no voxel of a 512 volume moves by more than half a millimetre."""

MOST_VOXELS = 2**31
"""Of a resampled volume: 8 GB as float32."""

IMAGE_INTERPOLATION = sitk.sitkLinear


class LoadedImage(NamedTuple):
    """A case's image as the network takes it, and the two grids between which its mask travels."""

    image: torch.Tensor  # (C, D, H, W) float32
    canonical: sitk.Image  # the network's grid, its voxels empty
    original: sitk.Image  # the file's grid, its voxels empty


def load_image(paths: Sequence[Path], settings: VolumeSettings) -> LoadedImage:
    """Read a case's image files, each oriented, resampled and normalised.

    Raises:
        DataError: A file is missing, damaged, holds NaN or nothing but one value, the channels are
            not `settings.channels`, or lie on different grids.
    """
    files = [(path, channel) for path in paths for channel in read_channels(path)]
    if len(files) != settings.channels:
        what = f"a 4D image of {len(files)}" if len(files) > len(paths) else f"a case of {len(files)}"
        raise DataError(
            f"{paths[0]}: {what} channels (3D images) where the config says channels: {settings.channels}"
        )
    first_path, original = files[0][0], empty_like(files[0][1])
    arrays, canonical = [], None
    while files:
        path, channel = files.pop(0)
        difference = grid_difference(channel, original)
        if difference:
            raise DataError(f"{path}: not on the grid of {first_path}: {difference}")
        # Turned as it is stored: in a large scan, the fewer arrays of float32 the better.
        channel = sitk.Cast(to_lps(channel), sitk.sitkFloat32)
        check_finite(channel, path)  # as float32, which large numbers do not fit into
        try:
            channel = to_canonical(channel, _triple(settings.spacing))
            canonical = empty_like(channel) if canonical is None else canonical
            arrays.append(normalise(to_array(channel), settings.normalisation))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    assert canonical is not None
    stacked = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
    return LoadedImage(torch.from_numpy(stacked), canonical, original)


def check_finite(image: sitk.Image, path: Path) -> None:
    """Refuse an image with NaN or infinite voxels.

    Raises:
        DataError: With their number.
    """
    bad = int((~np.isfinite(sitk.GetArrayViewFromImage(image))).sum())
    if bad:
        raise DataError(f"{path}: {bad} voxels are NaN or infinite; every voxel must be a number")


def to_canonical(
    image: sitk.Image, spacing: tuple[float, float, float] | None, *, label: bool = False
) -> sitk.Image:
    """The image with its axes along left, posterior, superior (as near as they are), resampled if asked.

    Oblique scans stay oblique. Images are interpolated linearly after a Gaussian that takes the
    detail away which the coarser grid cannot hold; labels by the vote of their neighbours.

    Args:
        image: A 3D image.
        spacing: (depth, height, width) in mm; None, or equal within 1e-3 mm, changes no value.
        label: The voxels are label values.
    """
    oriented = to_lps(image)
    if spacing is None or np.allclose(spacing_dhw(oriented), spacing, rtol=0, atol=SPACING_TOLERANCE):
        return oriented
    grid = _regrid(oriented, tuple(reversed(spacing)))
    if label:
        return resample_labels(oriented, grid)
    return sitk.Resample(_blur_for(oriented, grid), grid, sitk.Transform(), IMAGE_INTERPOLATION)


def to_array(image: sitk.Image) -> np.ndarray:
    """The voxels of a canonical image: (D, H, W), to superior, posterior, left."""
    return sitk.GetArrayFromImage(image)


def normalise(array: np.ndarray, how: Normalisation) -> np.ndarray:
    """Intensities as float32 in the range that networks take.

    Raises:
        DataError: The image has one value only, so it has no contrast to normalise.
    """
    if how.method == "zscore":
        spread = float(array.std(dtype=np.float64))
        if spread == 0:
            raise DataError(constant(array))
        scaled = array.astype(np.float32)
        scaled -= float(array.mean(dtype=np.float64))
        scaled /= spread
        return scaled
    if how.method == "window":
        assert how.window is not None
        low, high = how.window
    else:
        low, high = (float(value) for value in np.percentile(array, how.percentiles))
        if low == high:  # a small object in a wide background of zeros
            low, high = float(array.min()), float(array.max())
        if low == high:
            raise DataError(constant(array))
    scaled = array.astype(np.float32)  # one copy, changed in place
    scaled -= low
    scaled *= 2 / (high - low)
    scaled -= 1
    return np.clip(scaled, -1, 1, out=scaled)


def restore_mask(mask: np.ndarray, canonical: sitk.Image, original: sitk.Image) -> sitk.Image:
    """A mask on the network's grid, brought back onto the grid and orientation of the scan.

    Args:
        mask: (D, H, W) integers on the grid of `canonical`.
        canonical: As made by `to_canonical` from `original`.
        original: The scan as it was read.

    Raises:
        ShapeError: The mask has not the shape of `canonical`.
    """
    if mask.shape != canonical.GetSize()[::-1]:
        raise ShapeError(f"the mask has shape {mask.shape}, its grid {canonical.GetSize()[::-1]} (D, H, W)")
    image = smallest_type(sitk.GetImageFromArray(mask))
    image.CopyInformation(canonical)
    grid = oriented_grid(original)
    return turned_like(resample_labels(image, grid) if grid_difference(image, grid) else image, original)


def to_file_values(mask: sitk.Image, settings: VolumeSettings) -> sitk.Image:
    """A mask of labels 1, 2, ... with the values that the cohort's files have for them."""
    image = sitk.GetImageFromArray(settings.file_values[sitk.GetArrayViewFromImage(mask)])
    image.CopyInformation(mask)
    return image


def _regrid(image: sitk.Image, spacing: Sequence[float]) -> sitk.Image:
    """An empty image around the same centre with voxels of `spacing` (x, y, z), covering all of `image`.

    Rounded up: the centres of the outer voxels of each grid then lie inside the other one.
    """
    extent = np.array(image.GetSize()) * image.GetSpacing()
    size = np.maximum(np.ceil(extent / spacing - 1e-3), 1).astype(int)
    direction = np.reshape(image.GetDirection(), (3, 3))
    centre = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    if np.prod(size, dtype=float) > MOST_VOXELS:
        sides, voxels = (" x ".join(f"{number:.6g}" for number in three) for three in (spacing, size))
        raise DataError(
            f"resampled to {sides} mm it would have {voxels} voxels; "
            "is its spacing right, or is data.spacing too fine?"
        )
    grid = sitk.Image([int(n) for n in size], image.GetPixelID())
    grid.SetSpacing([float(side) for side in spacing])
    grid.SetDirection(image.GetDirection())
    grid.SetOrigin((np.array(centre) - direction @ ((size - 1) / 2 * spacing)).tolist())
    return grid


def _blur_for(image: sitk.Image, grid: sitk.Image) -> sitk.Image:
    """Blur along the axes that become coarser, from the resolution of the image to that of the grid.

    A voxel stands for a Gaussian whose width at half height is its side (Cardoso et al., "Scale
    factor point spread function matching", MICCAI 2015); variances add up.
    """
    sides, coarser = np.array(image.GetSpacing()), np.array(grid.GetSpacing())
    variance = np.maximum(coarser**2 - sides**2, 0) / (8 * np.log(2))
    if not variance.any():
        return image
    return sitk.DiscreteGaussian(image, variance.tolist())


def _triple(spacing: Sequence[float] | None) -> tuple[float, float, float] | None:
    if spacing is None:
        return None
    depth, height, width = spacing
    return (depth, height, width)


def constant(array: np.ndarray) -> str:
    """What is said of an image that has one value only."""
    return f"every voxel is {array.flat[0]}; an image with contrast is due"
