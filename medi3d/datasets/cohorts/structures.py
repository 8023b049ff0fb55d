"""Labels kept as a binary mask each, joined into one map."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medi3d.datasets.images.files import read_volume
from medi3d.datasets.images.formats import ITK, NIFTI, suffix_of
from medi3d.datasets.images.geometry import grid_difference
from medi3d.datasets.images.preprocessing import check_finite
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import DataError


def find_structures(folder: Path) -> dict[str, Path]:
    """Name -> mask of the volumes in a folder, named by their files; none in that of a DICOM series.

    Raises:
        DataError: Two files have one name.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or suffix_of(path) not in (*NIFTI, *ITK):
            continue
        name = path.name[: len(path.name) - len(suffix_of(path))]
        if name in found:
            raise DataError(f"{path}: {found[name].name} is the mask of {name} too; one file a label")
        found[name] = path
    return found


def join_structures(
    masks: Mapping[str, Path], settings: VolumeSettings, like: sitk.Image | None, case: str
) -> sitk.Image:
    """The labels of `settings` as one map, numbered 1, 2, ...; masks of other names are not looked at.

    Args:
        masks: Name of a label -> its file, voxels 0 and one other value.
        settings: Which labels there are, and which wins where they overlap.
        like: The image that they belong to, as it was read; the first mask where there is none.
        case: Name of the case, for messages.

    Raises:
        DataError: A label has no mask, a mask is not on the grid of the image or holds several values, two
            overlap and `settings.overlaps` does not say which wins, or all are empty.
    """
    lacking = [name for name in settings.label_names if name not in masks]
    if lacking:
        raise DataError(
            f"case {case}: no mask of {', '.join(lacking)} (there are {', '.join(masks) or 'none'}); "
            "of an absent structure give a mask of zeros"
        )
    numbers = {name: number for number, name in enumerate(settings.label_names, 1)}
    grid = None if like is None else sitk.DICOMOrient(like, "LPS")
    joined = np.zeros(0, np.uint8)
    for name in settings.overlaps or settings.label_names:
        mask = sitk.DICOMOrient(read_volume(masks[name]), "LPS")
        if grid is None:
            grid = mask
        if not joined.size:
            joined = np.zeros(grid.GetSize()[::-1], np.uint8)
        inside = _inside(mask, grid, masks[name])
        if not settings.overlaps and joined[inside].any():
            other = settings.label_names[int(joined[inside].max()) - 1]
            raise DataError(
                f"{masks[name]}: {np.count_nonzero(joined[inside])} voxels are {other} or another label too; "
                "say with data.overlaps, a list of all labels, which wins (the later one)"
            )
        joined[inside] = numbers[name]
    if not joined.any() and not settings.empty_labels:
        raise DataError(f"case {case}: all masks are empty; data.empty_labels: true takes it")
    image = sitk.GetImageFromArray(joined)
    image.CopyInformation(grid)
    return image


def _inside(mask: sitk.Image, grid: sitk.Image, path: Path) -> np.ndarray:
    if difference := grid_difference(mask, grid):
        raise DataError(f"{path}: the mask is not on the grid of its image: {difference}")
    check_finite(mask, path)
    array = sitk.GetArrayViewFromImage(mask)
    values = np.unique(array[array != 0])
    if len(values) > 1:
        shown = ", ".join(f"{value:g}" for value in values[:5])
        raise DataError(f"{path}: holds the values {shown}; a mask of one label holds 0 and one other")
    return array != 0
