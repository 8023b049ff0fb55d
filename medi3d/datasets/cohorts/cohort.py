"""Read the list of a cohort: its cases with their images, labels and splits."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medi3d.datasets.cohorts.lists import read_csv, read_json
from medi3d.datasets.cohorts.structures import find_structures
from medi3d.datasets.images.formats import DICOM, VOLUMES, place_of, suffix_of
from medi3d.errors import DataError


@dataclass(frozen=True)
class Case:
    """One examination: its image files (one for each channel, or one 4D file) and its label.

    Attributes:
        name: Unique in the cohort.
        images: Files, or folders of one DICOM series each.
        label: A file with all labels; None if there is none.
        structures: Instead of `label`: (name, mask file) of each label.
        fold: The fold that validates on it, 0, 1, ..., if the list names one.
        subject: Cases of one subject stay together in a split.
        split: "training", "validation", another name (left out of both), or None: not given.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    subject: str
    split: str | None = None
    structures: tuple[tuple[str, Path], ...] = ()
    fold: int | None = None

    @property
    def label_files(self) -> tuple[Path, ...]:
        """All files of its labels; empty if it has none."""
        return (self.label,) if self.label else tuple(path for _, path in self.structures)


@dataclass(frozen=True)
class Cohort:
    """Cases, and what the list says about them.

    Attributes:
        cases: In the order of the list.
        labels: Name -> value (background 0 included if named); empty where the list names none.
        name: Of the cohort.
        channels: Names of the channels; empty where the list names none.
    """

    cases: tuple[Case, ...]
    labels: dict[str, int]
    name: str
    channels: tuple[str, ...] = ()


def read_cohort(root: Path | str) -> Cohort:
    """Read the list of a cohort; no image is opened, but each file must exist.

    Args:
        root: A folder in the layout of the Medical Segmentation Decathlon or in nnU-Net's
            (`dataset.json`), or a list: `.csv` with the columns image, label, and optionally
            name, subject, split, fold (several image files separated by ";"), or `.json` (a list of such
            objects, or as `dataset.json`; of MONAI's data lists `training`, `validation` and `testing` are
            read). Paths are relative to the list. For labels with one mask each, label is their folder, or
            there is a column `label:NAME` for each (in JSON an object).

    Raises:
        DataError: The list is missing, damaged, empty, or names a missing file.
    """
    root = Path(root)
    listing = root / "dataset.json" if root.is_dir() else root
    if not listing.is_file():
        raise DataError(f"{listing}: no such file; give a folder with dataset.json, or a .csv or .json list")
    if listing.suffix.lower() not in (".csv", ".json"):
        raise DataError(f"{listing}: a cohort is a folder with dataset.json, or a .csv or .json list")
    described, rows = read_csv(listing) if listing.suffix.lower() == ".csv" else read_json(listing)
    if not rows:
        raise DataError(f"{listing}: no case in the list; at least one image is needed")
    channels = _channels(described, rows, listing)
    cases = _cases(rows, listing, channels)
    _check_files(cases, listing)
    name = str(described.get("name") or (root.name if root.is_dir() else root.stem))
    return Cohort(cases, _labels(described, listing), name, channels)


def _channels(described: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> tuple[str, ...]:
    """Names of the channels: MSD has {"0": "FLAIR", "1": "T1c"} under modality or channel_names.

    A list names them in order; a single word is the name of each.
    """
    named = described.get("channel_names") or described.get("modality") or {}
    if isinstance(named, str):
        image = rows[0].get("image")
        return (named,) * (len(image) if isinstance(image, list) else 1)
    if isinstance(named, list):
        return tuple(map(str, named))
    try:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    except (TypeError, ValueError) as error:
        raise DataError(f'{path}: modality is {named!r}; expected {{"0": "name", ...}}') from error


def _labels(described: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Name -> value, from MSD's {"1": "Anterior"} or from {"Anterior": 1}."""
    labels = described.get("labels") or {}
    try:
        if all(re.fullmatch(r"\d+", str(key)) for key in labels):
            return {str(name): int(value) for value, name in labels.items()}
        return {str(name): int(value) for name, value in labels.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f'{path}: labels is {labels!r}; expected {{"1": "name", ...}}') from error


def _cases(rows: Sequence[Mapping[str, Any]], listing: Path, channels: Sequence[str]) -> tuple[Case, ...]:
    images = [_images(row, number, listing, len(channels)) for number, row in enumerate(rows, 1)]
    paths = [Path(files[0].strip().replace("\\", "/")) for files in images]
    stems = [_stem(path, len(files) > 1) for path, files in zip(paths, images, strict=True)]
    if len(set(stems)) < len(stems):  # sub-01/t1.nii.gz, sub-02/t1.nii.gz: only the folders differ
        stems = ["_".join((*path.parts[:-1], s)) for path, s in zip(paths, stems, strict=True)]
    cases = []
    fold_of = [_fold(row, number, listing) for number, row in enumerate(rows, 1)]
    for row, files, stem, fold in zip(rows, images, stems, fold_of, strict=True):
        name = str(row.get("name") or stem)
        split = row.get("split")
        label, structures = _label_of(row.get("label"), listing)
        cases.append(
            Case(
                name=name,
                images=tuple(place(listing, file) for file in files),
                fold=fold,
                label=label,
                structures=structures,
                subject=str(row.get("subject") or name),
                split=str(split).strip().lower() if split else None,
            )
        )
    repeated = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    if repeated:
        raise DataError(
            f"{listing}: the case {repeated[0]} is listed more than once; each case has its own name"
        )
    return tuple(cases)


def _label_of(given: Any, listing: Path) -> tuple[Path | None, tuple[tuple[str, Path], ...]]:
    """One label file; or the masks of a folder, or of an object {name: file}."""
    if not given:
        return None, ()
    if isinstance(given, Mapping):
        masks = {str(name): place(listing, str(file)) for name, file in given.items() if file}
        return None, tuple(masks.items())
    path = place(listing, str(given))
    masks = find_structures(path) if path.is_dir() else {}
    return (None, tuple(masks.items())) if masks else (path, ())


def _images(row: Mapping[str, Any], number: int, listing: Path, channels: int) -> list[str]:
    image = row.get("image")
    files = [image] if isinstance(image, str) else image
    if not isinstance(files, list) or not files or not all(isinstance(f, str) and f.strip() for f in files):
        raise DataError(f"{listing}: case {number} has no image ({image!r}); expected a path or several")
    if len(files) > 1 and channels and len(files) != channels:
        raise DataError(
            f"{listing}: case {number} has {len(files)} image files where modality names {channels} channels"
        )
    if len(files) == 1 and not place(listing, files[0]).exists():
        return _numbered(files[0], listing, channels) or files
    return files


def _numbered(image: str, listing: Path, channels: int) -> list[str]:
    """nnU-Net version 1 lists CASE.nii.gz for the files CASE_0000.nii.gz, CASE_0001.nii.gz, ..."""
    suffix = suffix_of(Path(image))
    stem = image.strip()[: len(image.strip()) - len(suffix)]
    files = [f"{stem}_{number:04}{image.strip()[len(stem) :]}" for number in range(max(channels, 1))]
    return files if place(listing, files[0]).exists() else []


def _fold(row: Mapping[str, Any], number: int, listing: Path) -> int | None:
    fold = row.get("fold")
    if fold is None or fold == "":
        return None
    try:
        if int(fold) == float(fold) >= 0:
            return int(fold)
    except (TypeError, ValueError):
        pass
    raise DataError(f"{listing}: case {number} has the fold {fold!r}; a whole number, 0 or more")


def place(listing: Path, file: str) -> Path:
    """Resolve a file of a list: relative to the list; as a Windows path if it exists only as one."""
    path = listing.parent / file.strip()
    if "\\" in file and not path.exists():
        return listing.parent / file.strip().replace("\\", "/")
    return path


def _stem(path: Path, several: bool) -> str:
    suffix = suffix_of(path)
    known = suffix in VOLUMES + DICOM  # 1.2.840 has none
    stem = path.name[: len(path.name) - len(suffix)] if known else path.name
    return re.sub(r"_\d{4}$", "", stem) if several else stem


def _check_files(cases: Sequence[Case], listing: Path) -> None:
    files = [file for case in cases for file in (*case.images, *case.label_files)]
    missing = [file for file in files if not place_of(file)[0].exists()]
    if missing:
        raise DataError(f"{missing[0]}: no such file, named in {listing} ({len(missing)} files are missing)")
