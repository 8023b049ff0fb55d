"""Read one case from its files, ready for a network."""

from typing import Any

import SimpleITK as sitk
import torch

from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.cohorts.labels import read_label
from medi3d.datasets.cohorts.structures import join_structures
from medi3d.datasets.images.geometry import spacing_dhw
from medi3d.datasets.images.preprocessing import load_image, to_array, to_canonical
from medi3d.datasets.images.settings import VolumeSettings


def load_case(case: Case, settings: VolumeSettings) -> dict[str, Any]:
    """Load one case, checked, oriented, resampled and normalised.

    Returns:
        "image" (C, D, H, W) float32, "label" (1, D, H, W) uint8 if the case has one, "name", and
        "spacing", the voxel sides (depth, height, width) in mm.

    Raises:
        DataError: With the file's name: see `load_image`; or the label is not on the image's grid,
            has no labelled voxel (see `read_label`), or a value that is not in `settings.labels`.
    """
    loaded = load_image(case.images, settings)
    sample: dict[str, Any] = {
        "image": loaded.image,
        "name": case.name,
        "spacing": spacing_dhw(loaded.canonical),
    }
    if case.label_files:
        label = load_label(case, settings, loaded.original)
        canonical = to_canonical(label, spacing_dhw(loaded.canonical), label=True)
        sample["label"] = torch.from_numpy(to_array(canonical))[None]
    return sample


def load_label(case: Case, settings: VolumeSettings, like: sitk.Image | None = None) -> sitk.Image:
    """Read a case's label with `read_label`, or join its masks.

    Raises:
        DataError: As `read_label` and `join_structures`.
    """
    if case.label is not None:
        return read_label(case.label, settings, like)
    return join_structures(dict(case.structures), settings, like, case.name)
