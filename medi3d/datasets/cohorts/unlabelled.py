"""Volumes and label maps for pretraining, pooled from several cohorts without using their labels."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from medi3d.datasets.cohorts.cohort import Case, read_cohort
from medi3d.datasets.cohorts.splits import TRAINING
from medi3d.datasets.images.files import read_volume
from medi3d.datasets.images.formats import VOLUMES, content_files, suffix_of, volumes_among
from medi3d.datasets.images.geometry import spacing_dhw
from medi3d.datasets.images.preprocessing import load_image, to_array, to_canonical
from medi3d.datasets.images.settings import Normalisation, VolumeSettings
from medi3d.errors import ConfigError, DataError

CENTRES = 4096
"""Most voxels of a case kept as possible centres of patches."""


@dataclass(frozen=True)
class UnlabelledCohort:
    """One of the cohorts for pretraining.

    Attributes:
        root: Folder in the MSD layout, a .csv or .json list, a folder of image files, or one image file.
            If a list names splits, only its training cases are used.
        modality: "MR" or "CT".
        normalisation: How intensities are normalised; no effect on label maps.
        spacing: Voxel sides (depth, height, width) in mm to resample to; None keeps each case's own.
        repeat: How often each case is shown per epoch, for cohorts of few large volumes.
        exclude_validation_of: A segmentation config on the same cohort: its validation cases are left out.
    """

    root: str
    modality: str = "MR"
    normalisation: Normalisation = field(default_factory=Normalisation)
    spacing: list[float] | None = None
    repeat: int = 1
    exclude_validation_of: str | None = None

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ConfigError(f"data.cohorts: repeat is {self.repeat}: 1 or more")
        self.volumes(1)

    def volumes(self, channels: int) -> VolumeSettings:
        """The settings with which its images are read."""
        facts = {"normalisation": self.normalisation, "spacing": self.spacing, "channels": channels}
        return VolumeSettings(self.root, self.modality, {"unread": 1}, **facts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class UnlabelledSettings:
    """The data for pretraining (config section `data`).

    Attributes:
        cohorts: The sources of the volumes or label maps.
        patch: Size (depth, height, width) in voxels of a training patch.
        validation: Number of cases, over all cohorts, on which the pretext task is validated.
        split_seed: Seed of that choice.
    """

    cohorts: list[UnlabelledCohort]
    patch: list[int] = field(default_factory=lambda: [96, 96, 96])
    validation: int = 8
    split_seed: int = 0

    def __post_init__(self) -> None:
        if not self.cohorts:
            raise ConfigError("data.cohorts is empty: give at least one cohort with its root")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ConfigError(f"data.patch is {self.patch}: three sizes (depth, height, width), 1 or more")
        if self.validation < 1:
            raise ConfigError(f"data.validation is {self.validation}: 1 or more")


@dataclass(frozen=True)
class Volume:
    """One volume or label map for pretraining: its files, and the number of its cohort in the settings."""

    name: str
    files: tuple[Path, ...]
    cohort: int


def list_volumes(
    settings: UnlabelledSettings, *, channels: int, maps: bool, excluded: Mapping[int, Iterable[Path]]
) -> list[Volume]:
    """Every volume of the cohorts, in the order of their names.

    Args:
        settings: the cohorts.
        channels: of the network; if 1, each image file of a case is a volume of its own.
        maps: list label maps: the label of a case, or its only file if it has no label.
        excluded: number of a cohort -> image files whose cases are left out.

    Raises:
        DataError: a cohort is missing, or has no case left.
    """
    volumes = []
    for number, cohort in enumerate(settings.cohorts):
        out = {path.resolve() for path in excluded.get(number, ())}
        cases = [case for case in _cases(Path(cohort.root)) if case.split in (None, *TRAINING)]
        cases = [case for case in cases if not any(path.resolve() in out for path in case.images)]
        if not cases:
            raise DataError(f"{cohort.root}: no case is left to pretrain on")
        for case in cases:
            name, images = f"{Path(cohort.root).name}/{case.name}", case.images
            if maps and case.structures:
                raise DataError(f"{cohort.root}: case {case.name} has one mask per label; maps need one file")
            if maps:
                volumes.append(Volume(name, (case.label or images[0],), number))
            elif channels > 1 or len(images) == 1:
                volumes.append(Volume(name, images, number))
            else:
                volumes += [Volume(f"{name}#{i}", (image,), number) for i, image in enumerate(images)]
    return sorted(volumes, key=lambda volume: volume.name)


def _cases(root: Path) -> Sequence[Case]:
    """The cases of a list, or one for each image file in a folder."""
    if root.is_dir() and not (root / "dataset.json").is_file():
        files = volumes_among(root.iterdir())
        if not files:
            raise DataError(
                f"{root}: no dataset.json and no image file ({', '.join(VOLUMES)}) in this folder"
            )
    elif root.is_file() and suffix_of(root) in VOLUMES:
        files = [root]
    else:
        return read_cohort(root).cases
    return [Case(path.name.removesuffix(suffix_of(path)), (path,), None, path.name) for path in files]


def load_volume(volume: Volume, settings: UnlabelledSettings, channels: int) -> dict[str, Any]:
    """Read a volume, oriented, resampled and normalised.

    Returns:
        "image" `(C, D, H, W)` float32, "name", "spacing" (depth, height, width) in mm, and "centres", voxels
        `(n, 3)` brighter than the mean.

    Raises:
        DataError: as `load_image`.
    """
    cohort = settings.cohorts[volume.cohort]
    loaded = load_image(volume.files, cohort.volumes(channels))
    bright = loaded.image[0] > loaded.image[0].mean()
    centres = _some(bright.nonzero(), CENTRES)
    sides = spacing_dhw(loaded.canonical)
    return {"image": loaded.image, "name": volume.name, "spacing": sides, "centres": centres}


def load_map(volume: Volume, settings: UnlabelledSettings) -> dict[str, Any]:
    """Read a label map, oriented, resampled and cropped to its labelled part.

    Returns:
        "label" `(1, D, H, W)` uint8, numbers 0, 1, ... in the order of "values", the labels as they are in
        the file; "name", "spacing" in mm, and "centres" `(n, 3)`, the voxels of each label, up
        to a limit.

    Raises:
        DataError: the file is damaged, its values are not labels, or it has more than 256 labels.
    """
    path, sides = volume.files[0], settings.cohorts[volume.cohort].spacing
    stored = read_volume(path)
    array = sitk.GetArrayViewFromImage(stored)
    if array.min() < 0 or not np.array_equal(array, np.round(array)):
        raise DataError(f"{path}: holds values other than whole numbers from 0; expected a label map")
    wanted = None if sides is None else (sides[0], sides[1], sides[2])
    canonical = to_canonical(sitk.Cast(stored, sitk.sitkInt32), wanted, label=True)
    counts = np.bincount(to_array(canonical).ravel())
    values = np.flatnonzero(counts)
    if not 2 <= len(values) <= 256:
        raise DataError(f"{path}: {len(values)} different labels; 2 to 256 can be drawn")
    number_of = np.zeros(len(counts), np.uint8)
    number_of[values] = np.arange(len(values))
    label = _cropped(torch.from_numpy(number_of[to_array(canonical)]))
    thinned = label[::2, ::2, ::2]
    each = [_some(2 * (thinned == n).nonzero(), CENTRES // len(values)) for n in range(1, len(values))]
    return {
        "label": label[None],
        "values": torch.from_numpy(values),
        "name": volume.name,
        "spacing": spacing_dhw(canonical),
        "centres": torch.cat(each),
    }


def _cropped(label: Tensor) -> Tensor:
    """Crop the empty border of a map `(D, H, W)`."""
    for axis in range(3):
        filled = label.amax(dim=tuple(other for other in range(3) if other != axis)).nonzero()[:, 0]
        label = label.narrow(axis, int(filled[0]), int(filled[-1] - filled[0]) + 1)
    return label.contiguous()


def _some(voxels: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly spaced."""
    step = max(1, -(-len(voxels) // max(1, count)))
    return voxels[::step].to(torch.int16)


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder (a DICOM series) in the order of their names."""
    digest = hashlib.sha256()
    for file in content_files(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()
