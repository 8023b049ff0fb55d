"""Join labels, each stored as a binary mask, into one map."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medi3d.datasets.images.files import read_volume
from medi3d.datasets.images.formats import suffix_of, volumes_among
from medi3d.datasets.images.lattice import on_grid_of
from medi3d.datasets.images.preprocessing import without_nan
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import DataError

ROUNDING = 1e-3
"""Values this close to a whole number are rounded to it: they were scaled or resampled as floats."""


def find_structures(folder: Path) -> dict[str, Path]:
    """Name -> mask of the volumes in a folder, named after their files; empty for a DICOM series.

    Raises:
        DataError: Two files have the same name.
    """
    found: dict[str, Path] = {}
    for path in volumes_among(folder.iterdir()):
        name = path.name[: len(path.name) - len(suffix_of(path))]
        if name in found:
            raise DataError(f"{path}: {found[name].name} is the mask of {name} too; give one file per label")
        found[name] = path
    return found


def join_structures(
    masks: Mapping[str, Path], settings: VolumeSettings, like: sitk.Image | None, case: str
) -> sitk.Image:
    """Read the labels of `settings` as one map, numbered 1, 2, ...; masks with other names are ignored.

    Args:
        masks: Name of a label -> its file, voxels 0 and one other value.
        settings: Which labels there are, and which wins where they overlap.
        like: The image that they belong to, as read; the first mask if there is none.
        case: Name of the case, for messages.

    Raises:
        DataError: A label has no mask, a mask is not on the grid of the image or holds several values, two
            overlap and `settings.overlaps` does not say which wins, or all are empty.
    """
    lacking = [name for name in settings.label_names if name not in masks]
    if lacking:
        raise DataError(
            f"case {case}: no mask of {', '.join(lacking)} (there are {', '.join(masks) or 'none'}); "
            "for an absent structure give a mask of zeros"
        )
    grid = like if like is not None else read_volume(masks[settings.label_names[0]])

    def inside(name: str) -> np.ndarray:
        return _inside(masks[name], grid, settings)

    joined = join_masks(inside, settings, f"case {case}", {name: str(masks[name]) for name in masks})
    if not joined.any() and not settings.empty_labels:
        raise DataError(f"case {case}: all masks are empty; data.empty_labels: true takes it")
    image = sitk.GetImageFromArray(joined)
    image.CopyInformation(grid)
    return image


def join_masks(
    inside: Callable[[str], np.ndarray],
    settings: VolumeSettings,
    where: str,
    files: Mapping[str, str] | None = None,
) -> np.ndarray:
    """Join masks into one uint8 map, the labels of `settings` numbered 1, 2, ...

    Args:
        inside: Name of a label -> its mask, bool, all of one shape.
        settings: Which labels there are, and which wins where they overlap.
        where: For the message.
        files: Name -> its file, for the message, if each label has its own.

    Raises:
        DataError: Two overlap and `settings.overlaps` does not say which wins.
    """
    numbers = {name: number for number, name in enumerate(settings.label_names, 1)}
    joined: np.ndarray | None = None
    for name in settings.overlaps or settings.label_names:
        mask = inside(name)
        if joined is None:
            joined = np.zeros(mask.shape, np.uint8)
        if not settings.overlaps and joined[mask].any():
            other = settings.label_names[int(joined[mask].max()) - 1]
            raise DataError(
                f"{(files or {}).get(name, f'{where}, {name}')}: {np.count_nonzero(joined[mask])} voxels are "
                f"{other} or another label too; say with data.overlaps, a list of all labels, which wins "
                "(the later one)"
            )
        joined[mask] = numbers[name]
    assert joined is not None
    return joined


def whole_numbers(image: sitk.Image, settings: VolumeSettings, path: Path) -> sitk.Image:
    """A mask rounded to whole numbers if it is close to them; otherwise its values are unchanged.

    Raises:
        DataError: Voxels are infinite, or NaN and `settings.nan` refuses that.
    """
    image, _ = without_nan(image, settings, path, label=True)
    array = sitk.GetArrayViewFromImage(image)
    if array.dtype.kind in "iu":
        return image
    rounded = np.rint(array)
    if np.abs(array - rounded).max() > ROUNDING:
        return image
    result = sitk.GetImageFromArray(rounded.astype(np.int32) if np.abs(rounded).max() < 2**31 else rounded)
    result.CopyInformation(image)
    return result


def _inside(path: Path, grid: sitk.Image, settings: VolumeSettings) -> np.ndarray:
    mask = whole_numbers(read_volume(path), settings, path)
    try:
        mask = on_grid_of(mask, grid)
    except DataError as error:
        raise DataError(f"{path}: the mask is not on the grid of its image: {error}") from error
    array = sitk.GetArrayFromImage(mask)
    values = np.unique(array[array != 0])
    if len(values) > 1:
        shown = ", ".join(f"{value:g}" for value in values[:5])
        raise DataError(f"{path}: holds the values {shown}; a mask of one label holds 0 and one other")
    return array != 0
