"""Convert a scan to the array that a network takes, and a mask back to the scan.

Orient to LPS, resample if a spacing is asked for, normalise. Where the scan already has that
spacing nothing is interpolated: axes are permuted and flipped, which loses nothing.
"""

import logging
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

log = logging.getLogger(__name__)
SPACING_TOLERANCE = 1e-3
"""Spacings (mm) closer than this are equal: no voxel of a 512 volume moves by more than half a millimetre."""

SPACING_SHARE = 5e-3
"""They must also differ by less than this fraction of the side, which matters below 0.2 mm (micro-CT)."""

MOST_VOXELS = 2**31
"""Most voxels of a resampled volume: 8 GB as float32."""

IMAGE_INTERPOLATION = sitk.sitkLinear


class LoadedImage(NamedTuple):
    """A case's image as the network takes it, and the two grids between which its mask is mapped."""

    image: torch.Tensor  # (C, D, H, W) float32
    canonical: sitk.Image  # the network's grid, its voxels empty
    original: sitk.Image  # the file's grid, its voxels empty


def load_image(paths: Sequence[Path], settings: VolumeSettings) -> LoadedImage:
    """Read a case's image files, each oriented, resampled and normalised.

    Raises:
        DataError: A file is missing, damaged, holds NaN or a single value, the number of channels is
            not `settings.channels`, or lie on different grids.
    """
    files = [(path, channel) for path in paths for channel in read_channels(path)]
    if len(files) != settings.channels:
        what = f"a 4D image of {len(files)}" if len(files) > len(paths) else f"a case of {len(files)}"
        raise DataError(
            f"{paths[0]}: {what} channels (3D images), but the config says channels: {settings.channels}"
        )
    first_path, original = files[0][0], empty_like(files[0][1])
    arrays: list[np.ndarray] = []
    canonical = None
    while files:
        path, channel = files.pop(0)
        difference = grid_difference(channel, original)
        if difference:
            raise DataError(f"{path}: not on the grid of {first_path}: {difference}")
        channel.CopyInformation(original)  # differently rounded headers could be oriented differently
        # Oriented in its stored type: in a large scan, float32 copies are expensive.
        channel = sitk.Cast(to_lps(channel), sitk.sitkFloat32)
        channel, fill = without_nan(channel, settings, path)  # as float32, which cannot hold all numbers
        try:
            channel = to_canonical(channel, _triple(settings.spacing))
            canonical = empty_like(channel) if canonical is None else canonical
            arrays.append(_scaled(to_array(channel), settings, len(arrays), fill, path))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    assert canonical is not None
    if settings.missing_channels == "zeros" and not any(array.any() for array in arrays):
        raise DataError(f"{first_path}: no channel of this case has contrast; at least one must")
    stacked = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
    return LoadedImage(torch.from_numpy(stacked), canonical, original)


def _scaled(
    array: np.ndarray, settings: VolumeSettings, number: int, fill: float | None, path: Path
) -> np.ndarray:
    """Normalise one channel; zeros if it is missing and that is allowed."""
    if array.min() == array.max():
        if settings.missing_channels == "zeros":
            return np.zeros(array.shape, np.float32)
        raise DataError(constant(array, settings.channels))
    scaled = normalise(array, settings.normalisation_of(number), fill)
    if scaled.min() == scaled.max():
        how = settings.normalisation_of(number)
        log.warning(
            "%s: %s has no contrast in the window %s, its values are %g to %g",
            *(path, settings.name_of(number), how.window, array.min(), array.max()),
        )
    return scaled


def without_nan(
    image: sitk.Image, settings: VolumeSettings, path: Path, *, label: bool = False
) -> tuple[sitk.Image, float | None]:
    """Replace NaN by the background; return the image and that value, None if there is no NaN.

    Args:
        image: 3D.
        settings: Its `nan` says whether NaN is background.
        path: The file, for the message.
        label: The voxels are labels: background is 0, not the lowest value of the image.

    Raises:
        DataError: Voxels are infinite, or NaN and `settings.nan` refuses that.
    """
    view = sitk.GetArrayViewFromImage(image)
    if np.isfinite(view).all():
        return image, None
    array = sitk.GetArrayFromImage(image)
    bad, infinite = np.isnan(array), int(np.isinf(array).sum())
    count = int(bad.sum())
    if infinite or settings.nan == "refuse":
        remedy = "" if infinite else "; where they are background, data.nan=background takes them as that"
        raise DataError(
            f"{path}: {count + infinite} voxels are NaN or infinite; every voxel must be a number{remedy}"
        )
    fill = 0.0 if label or bad.all() else float(array[~bad].min())
    array[bad] = fill
    filled = sitk.GetImageFromArray(array)
    filled.CopyInformation(image)
    return filled, fill


def to_canonical(
    image: sitk.Image, spacing: tuple[float, float, float] | None, *, label: bool = False
) -> sitk.Image:
    """Orient the image to left, posterior, superior (nearest axes) and resample it if asked.

    Oblique scans stay oblique. Images are interpolated linearly, after a Gaussian that removes
    detail too fine for the coarser grid; labels by the vote of their neighbours.

    Args:
        image: A 3D image.
        spacing: (depth, height, width) in mm; None, or equal within 1e-3 mm and 0.5 %, changes no value.
        label: The voxels are label values.
    """
    oriented = to_lps(image)
    if spacing is None or _alike(spacing_dhw(oriented), spacing):
        return oriented
    grid = _regrid(oriented, tuple(reversed(spacing)))
    if label:
        return resample_labels(oriented, grid)
    return sitk.Resample(_blur_for(oriented, grid), grid, sitk.Transform(), IMAGE_INTERPOLATION)


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    allowed = np.minimum(SPACING_TOLERANCE, SPACING_SHARE * np.array(other))
    return bool((np.abs(np.subtract(one, other)) <= allowed).all())


def to_array(image: sitk.Image) -> np.ndarray:
    """The voxels of a canonical image: (D, H, W), pointing to superior, posterior, left."""
    return sitk.GetArrayFromImage(image)


def normalise(array: np.ndarray, how: Normalisation, fill: float | None = None) -> np.ndarray:
    """Normalise intensities to float32 in the range that networks take.

    Args:
        array: One channel.
        how: See `Normalisation`.
        fill: A background value that no statistic counts; None: `how.background` decides.

    Raises:
        DataError: The image has one value only, so it has no contrast to normalise.
    """
    if how.method == "zscore":
        counted = _counted(array, how, fill)
        spread = float(counted.std(dtype=np.float64)) or float(array.std(dtype=np.float64))
        if spread == 0:
            raise DataError(constant(array))
        scaled = array.astype(np.float32)
        scaled -= float(counted.mean(dtype=np.float64))
        scaled /= spread
        return scaled
    low, high = intensity_range(array, how, fill)
    scaled = array.astype(np.float32)  # one copy, changed in place
    scaled -= low
    scaled *= 2 / (high - low)
    scaled -= 1
    return np.clip(scaled, -1, 1, out=scaled)


def intensity_range(array: np.ndarray, how: Normalisation, fill: float | None = None) -> tuple[float, float]:
    """The intensities that become -1 and 1, from a window or percentiles; otherwise as `normalise`.

    Raises:
        DataError: The image has one value only.
    """
    if how.method == "window":
        assert how.window is not None
        return how.window[0], how.window[1]
    low, high = (float(value) for value in np.percentile(_counted(array, how, fill), how.percentiles))
    if low == high:  # a small object in a wide background of zeros
        low, high = float(array.min()), float(array.max())
    if low == high:
        raise DataError(constant(array))
    return low, high


def _counted(array: np.ndarray, how: Normalisation, fill: float | None) -> np.ndarray:
    """The voxels that statistics use: all, or only the foreground."""
    value = fill
    if value is None and how.background == "ignored":
        value = constant_background(array)
    if value is None:
        return array
    counted = array[_differs(array, value)]
    return counted if counted.size else array


def constant_background(array: np.ndarray) -> float | None:
    """The value that more than half of the voxels have; None if there is none."""
    middle = float(np.median(array))  # if there is a majority, it has this value
    return middle if 2 * np.count_nonzero(_differs(array, middle)) < array.size else None


def _differs(array: np.ndarray, value: float) -> np.ndarray:
    """Where voxels differ from `value` by more than the rounding of resampling."""
    width = 1e-5 * (float(array.max()) - float(array.min()))
    return (array < value - width) | (array > value + width)


def restore_mask(mask: np.ndarray, canonical: sitk.Image, original: sitk.Image) -> sitk.Image:
    """Map a mask on the network's grid back onto the grid and orientation of the scan.

    Args:
        mask: (D, H, W) integers on the grid of `canonical`.
        canonical: As made by `to_canonical` from `original`.
        original: The scan as it was read.

    Raises:
        ShapeError: The mask's shape is not that of `canonical`.
    """
    if mask.shape != canonical.GetSize()[::-1]:
        raise ShapeError(f"the mask has shape {mask.shape}, its grid {canonical.GetSize()[::-1]} (D, H, W)")
    image = smallest_type(sitk.GetImageFromArray(mask))
    image.CopyInformation(canonical)
    grid = oriented_grid(original)
    return turned_like(resample_labels(image, grid) if grid_difference(image, grid) else image, original)


def to_file_values(mask: sitk.Image, settings: VolumeSettings) -> sitk.Image:
    """Replace labels 1, 2, ... by their values in the cohort's files."""
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
    """Blur along the axes that become coarser, from the image's resolution to the grid's.

    A voxel is modelled as a Gaussian whose full width at half maximum is its side (Cardoso et al., "Scale
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


def constant(array: np.ndarray, channels: int = 1) -> str:
    """The message for an image with a single value."""
    remedy = "; where a channel is missing, data.missing_channels=zeros takes it so" if channels > 1 else ""
    return f"every voxel is {array.flat[0]}: the image has no contrast{remedy}"
