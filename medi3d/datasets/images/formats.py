"""File formats of images, by suffix."""

import re
from collections.abc import Iterable
from pathlib import Path

from medi3d.errors import DataError

NIFTI = (".nii", ".nii.gz")
PAIRS = {".img": ".hdr", ".img.gz": ".hdr.gz"}
"""Voxels of a NIfTI or Analyze pair -> its header; either name means both files."""
MGH = (".mgz", ".mgh")
NIBABEL = (*NIFTI, *MGH, *PAIRS, *PAIRS.values())
DICOM = (".dcm", ".ima")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
VOLUMES = (*NIBABEL, *ITK)
"""Suffixes of volume files other than DICOM."""
HEADER_BYTES = 1 << 20
"""A header is at most this long."""

WRITABLE = (*NIFTI, ".nrrd", ".mha")
"""One file each: a mask with a separate data file could not be renamed into place in one step."""


def suffix_of(path: Path) -> str:
    """The file's ending in lower case, with `.nii.gz`, `.img.gz` and `.hdr.gz` in one piece."""
    name = path.name.lower()
    packed = Path(name.removesuffix(".gz")).suffix + ".gz"
    return packed if name.endswith(packed) and packed in NIBABEL else Path(name).suffix


def volumes_among(paths: Iterable[Path]) -> list[Path]:
    """The volumes among the files of a folder, sorted; a pair counts once, hidden files do not count."""
    known = sorted(path for path in paths if suffix_of(path) in VOLUMES and not path.name.startswith("."))
    there = set(known)
    return [path for path in known if path.is_file() and not _voxels_of(path) & there]


def _voxels_of(header: Path) -> set[Path]:
    """The names that the voxel file of a header may have; none if the file is not the header of a pair."""
    suffix = suffix_of(header)
    stem = header.name[: len(header.name) - len(suffix)]
    partners = [voxels for voxels, other in PAIRS.items() if other == suffix]
    return {header.with_name(stem + case) for voxels in partners for case in (voxels, voxels.upper())}


def place_of(path: Path) -> tuple[Path, str]:
    """Split FOLDER#CHOICE into the folder (or file) and the chosen series, "" if none is chosen."""
    folder, mark, choice = path.name.rpartition("#")
    if mark and choice and not path.exists() and path.with_name(folder or ".").is_dir():
        return path.with_name(folder), choice.strip()
    return path, ""


def is_series(path: Path) -> bool:
    """Whether a path names a DICOM series: a folder, one series of a folder, or a file with many frames."""
    place, _ = place_of(path)
    return place.is_dir() or (place.is_file() and suffix_of(place) in DICOM)


def content_files(path: Path) -> list[Path]:
    """The files that are read: all of a folder, by name; or a file, and its separate voxel file.

    Raises:
        DataError: a header names a voxel file outside its own folder.
    """
    place, _ = place_of(path)
    if place.is_dir():
        return sorted(part for part in place.iterdir() if part.is_file())
    return [place, *_detached(place)]


def _detached(header: Path) -> list[Path]:
    """The existing files that hold the voxels of a header; none if it holds them itself."""
    if suffix_of(header) in (".hdr", ".img"):
        other = header.with_suffix(".img" if suffix_of(header) == ".hdr" else ".hdr")
        return [other] if other.is_file() else []
    if suffix_of(header) not in (".mhd", ".nhdr") or not header.is_file():
        return []
    text = header.read_bytes()[:HEADER_BYTES].decode("latin-1")
    named = re.search(r"^(?:ElementDataFile *=|data ?file *:)[ \t]*(.*)$", text, re.MULTILINE | re.IGNORECASE)
    if named is None or named[1].strip().upper() == "LOCAL":
        return []
    first = named[1].strip()
    if first.startswith("LIST"):  # one file name per line, to the end
        names = [line.strip() for line in text[named.end() :].splitlines() if line.strip()]
    elif "%" in first:  # numbered files
        pattern = re.sub(r"%\d*d", "*", first.split()[0])
        names = sorted(one.name for one in header.parent.glob(pattern))
    else:
        names = [first]
    for name in names:
        if Path(name).name != Path(name).as_posix():
            raise DataError(f"{header}: its voxels are in {name!r}; they must be in the header's folder")
    return [header.with_name(name) for name in names if header.with_name(name).is_file()]


def check_format(path: Path) -> Path:
    """Return the path if it is a folder, a series in one, or a file with the suffix of a volume.

    Raises:
        DataError: It is missing, empty, or of another kind.
    """
    path = Path(path)
    if place_of(path)[0].is_dir():
        return path
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    suffix = suffix_of(path)
    if suffix not in VOLUMES + DICOM:
        hint = "expected " + ", ".join(VOLUMES) + " or the folder of a DICOM series"
        raise DataError(f"{path}: not a known volume format ({suffix or 'no suffix'}); {hint}")
    return path
