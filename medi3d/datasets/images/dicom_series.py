"""Find the series that a path names, and the files of its folder that are its slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medi3d.datasets.images.dicom_headers import (
    LOCALIZER_ANGLE,
    Instance,
    hidden_objects,
    names_of,
    read_instance,
    read_instances,
)
from medi3d.datasets.images.formats import place_of
from medi3d.errors import DataError


@dataclass(frozen=True)
class Found:
    """The images of one series.

    Attributes:
        images: its files.
        notes: what was left out of the folder, a line each.
    """

    images: tuple[Instance, ...]
    notes: tuple[str, ...] = ()


def find_series(path: Path) -> Found:
    """The images of the one series at a path: a folder, FOLDER#NUMBER, FOLDER#UID, or a file.

    Objects that are not images, and scouts and screenshots beside the only volume, are left out and noted.

    Raises:
        DataError: there is no series, there are several, or a file cannot be read.
    """
    folder, choice = place_of(path)
    if not folder.is_dir():
        return _of_file(folder)
    instances = read_instances(folder)
    images = [one for one in instances if one.is_image]
    others = [one for one in instances if not one.is_image]
    notes = [f"{one.kind.name.removesuffix(' Storage')} {one.path.name}" for one in others]
    hidden = hidden_objects(folder)
    if hidden:
        notes.append(f"hidden files {names_of(hidden)}")
    if not images:
        raise DataError(
            f"{folder}: no DICOM series in this folder; give the folder that holds the slices"
            + (f" (it holds {', '.join(notes)})" if notes else "")
        )
    groups = _grouped(images)
    if choice:
        chosen = _chosen(groups, choice, folder)
    else:
        chosen, beside = _only_volume(groups, folder)
        notes += [f"series {_described(group)}" for group in beside]
    kept, left = _without_scouts(chosen)
    if left:
        notes.append(f"images of other kind {names_of([one.path for one in left])}")
    lines = (f"{path}: left out beside the slices: {'; '.join(notes)}",) if notes else ()
    return Found(tuple(kept), lines)


def _of_file(path: Path) -> Found:
    instance = read_instance(path)
    if not instance.is_image:
        name = instance.kind.name.removesuffix(" Storage")
        raise DataError(f"{path}: {name}, not an image; give the folder of the slices")
    if not instance.is_multiframe:
        raise DataError(f"{path}: one slice of a DICOM series; give the folder of the series")
    return Found((instance,))


def _grouped(images: Sequence[Instance]) -> list[list[Instance]]:
    groups: dict[str, list[Instance]] = {}
    for one in images:
        groups.setdefault(one.series, []).append(one)
    return [*groups.values()]


def _chosen(groups: Sequence[list[Instance]], choice: str, folder: Path) -> list[Instance]:
    fitting = [group for group in groups if choice in (group[0].series, group[0].text("SeriesNumber"))]
    if len(fitting) != 1:
        found = f"{len(fitting)} of the series fit" if fitting else "no series fits"
        raise DataError(f"{folder}#{choice}: {found}; there are {_table(groups)}")
    return fitting[0]


def _only_volume(
    groups: Sequence[list[Instance]], folder: Path
) -> tuple[list[Instance], list[list[Instance]]]:
    """The series that may be volumes, and the others."""
    if len(groups) == 1:
        return groups[0], []
    volumes = [group for group in groups if _slices(group) > 1]
    if len(volumes) == 1:
        (volume,) = volumes
        planes = {one.plane for one in volume}
        beside = [group for group in groups if group is not volume]
        # A slice like those of the volume may belong to it, its series UID lost: the user decides.
        if not any(one.plane in planes for group in beside for one in group if one.is_grey):
            return volume, beside
    raise DataError(
        f"{folder}: {len(groups)} DICOM series in one folder; choose one as {folder.name}#NUMBER or "
        f"{folder.name}#UID: {_table(groups)}"
    )


def _slices(group: Sequence[Instance]) -> int:
    placed = [one for one in group if one.is_placed and one.is_grey and not one.is_localizer]
    return sum(one.frames for one in placed)


def _table(groups: Sequence[list[Instance]], most: int = 20) -> str:
    ordered = sorted(groups, key=lambda group: (group[0].text("SeriesNumber").zfill(12), group[0].series))
    rows = [_described(group) for group in ordered[:most]]
    return "; ".join(rows) + (f"; and {len(groups) - most} more" if len(groups) > most else "")


def _described(group: Sequence[Instance]) -> str:
    """Number, description, modality, size, UID."""
    first = group[0]
    words = [f"#{first.text('SeriesNumber') or '?'}"]
    if first.text("SeriesDescription"):
        words.append(f"'{first.text('SeriesDescription')}'")
    frames = sum(one.frames for one in group)
    words.append(first.text("Modality"))
    words.append(f"{first.text('Columns')}x{first.text('Rows')}x{frames}")
    return " ".join([*words, f"{first.series or 'unnamed'} ({len(group)} files)"])


def _without_scouts(images: Sequence[Instance]) -> tuple[list[Instance], list[Instance]]:
    """The slices of a series, and images of another kind with its UID."""
    kept, lone = list(images), _lone(images)
    for is_slice in (
        lambda one: not one.is_localizer,
        lambda one: one.is_grey,
        lambda one: one.path not in lone,
    ):
        rest = [one for one in kept if is_slice(one)]
        if sum(one.frames for one in rest) > 1:
            kept = rest
    return kept, [one for one in images if not any(one is other for other in kept)]


def _lone(images: Sequence[Instance]) -> set[Path]:
    """Images whose plane crosses that of all others."""
    normals = np.array([_normal(one) for one in images])
    alike = (np.abs(normals @ normals.T) > np.cos(np.radians(LOCALIZER_ANGLE))).sum(axis=1)
    return {one.path for one, count in zip(images, alike, strict=True) if count == 1}


def _normal(one: Instance) -> np.ndarray:
    """Zeros if it is unknown."""
    try:
        directions = np.array([float(v) for v in one.header.ImageOrientationPatient]).reshape(2, 3)
    except (AttributeError, TypeError, ValueError):
        return np.zeros(3)
    normal = np.cross(*directions)
    return normal / max(float(np.linalg.norm(normal)), 1e-3)
