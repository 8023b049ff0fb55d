"""One case read from its files, ready for a network."""

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.cohorts.structures import join_structures
from medi3d.datasets.images.dicom_labels import dicom_label_file, read_dicom_labels
from medi3d.datasets.images.files import read_volume
from medi3d.datasets.images.geometry import grid_difference, spacing_dhw
from medi3d.datasets.images.preprocessing import check_finite, load_image, to_array, to_canonical
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import DataError


def load_case(case: Case, settings: VolumeSettings) -> dict[str, Any]:
    """Load one case, checked, oriented, resampled and normalised.

    Returns:
        "image" (C, D, H, W) float32, "label" (1, D, H, W) uint8 if the case has one, "name", and
        "spacing", the voxel sides (depth, height, width) in mm.

    Raises:
        DataError: With the file's name: see `load_image`; or the label is not on the image's grid,
            has no labelled voxel (see `read_label`), or a value that `settings.labels` does not know.
    """
    loaded = load_image(case.images, settings)
    sample: dict[str, Any] = {
        "image": loaded.image,
        "name": case.name,
        "spacing": spacing_dhw(loaded.canonical),
    }
    if case.label_files:
        label = sitk.DICOMOrient(load_label(case, settings, loaded.original), "LPS")
        # Exactly the image's grid, so that headers rounded differently cannot give a voxel more or less.
        label.CopyInformation(sitk.DICOMOrient(loaded.original, "LPS"))
        canonical = to_canonical(label, spacing_dhw(loaded.canonical), label=True)
        sample["label"] = torch.from_numpy(to_array(canonical))[None]
    return sample


def load_label(case: Case, settings: VolumeSettings, like: sitk.Image | None = None) -> sitk.Image:
    """The label of a case that has one, as `read_label`, or joined from its masks (then turned to LPS).

    Raises:
        DataError: As `read_label` and `join_structures`.
    """
    if case.label is not None:
        return read_label(case.label, settings, like)
    return join_structures(dict(case.structures), settings, like, case.name)


def read_label(path: Path, settings: VolumeSettings, like: sitk.Image | None = None) -> sitk.Image:
    """A label file, checked, as uint8 with the labels numbered 1, 2, ... in the order of their values.

    Args:
        path: The file.
        settings: Which labels there are.
        like: The image that the label belongs to, as it was read; None where there is none.

    Raises:
        DataError: A value is no whole number or not in `settings.labels`, the label is not on the grid
            of `like`, or all voxels are background and `settings.empty_labels` does not allow that.
    """
    if found := dicom_label_file(path):
        named = {name: value for name, value in settings.labels.items() if value != 0}
        kinds = {"order": settings.overlaps, "may_lack": settings.empty_labels}
        image = read_dicom_labels(found, named, like, **kinds)  # type: ignore[arg-type]
    else:
        image = read_volume(path)
    if like is not None:
        # Compared as oriented: one may be stored flipped against the other and still be the same voxels.
        difference = grid_difference(*(sitk.DICOMOrient(one, "LPS") for one in (image, like)))
        if difference:
            raise DataError(f"{path}: the label is not on the grid of its image: {difference}")
    check_finite(image, path)
    present = np.unique(sitk.GetArrayViewFromImage(image))
    unknown = sorted(set(present.tolist()) - {0, *settings.labels.values()})
    if unknown:
        known = ", ".join(f"{name} {value}" for name, value in settings.labels.items())
        shown = ", ".join(f"{value:g}" for value in unknown[:5])
        raise DataError(
            f"{path}: label values {shown} are not among those of the config (background 0, {known})"
        )
    if not present.any() and not settings.empty_labels:
        raise DataError(
            f"{path}: the label is empty, every voxel is background (0); data.empty_labels: true takes it"
        )
    numbers = np.zeros(256, np.uint8)
    numbers[settings.file_values] = np.arange(len(settings.file_values))
    numbered = sitk.GetImageFromArray(numbers[sitk.GetArrayFromImage(sitk.Cast(image, sitk.sitkUInt8))])
    numbered.CopyInformation(image)
    return numbered
