"""File formats of images, by suffix."""

from pathlib import Path

from medi3d.errors import DataError

NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".ima")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
WRITABLE = (*NIFTI, ".nrrd", ".mha")
"""One file each: a mask with a separate data file could not be renamed into place in one step."""


def suffix_of(path: Path) -> str:
    """The file's ending in lower case, `.nii.gz` in one piece."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def place_of(path: Path) -> tuple[Path, str]:
    """A folder or file, and which series of the folder is meant: FOLDER#CHOICE, "" where none is chosen."""
    folder, mark, choice = path.name.rpartition("#")
    if mark and choice and not path.exists() and path.with_name(folder or ".").is_dir():
        return path.with_name(folder), choice.strip()
    return path, ""


def is_series(path: Path) -> bool:
    """Whether a path means a DICOM series: a folder, one series of a folder, or a file with many frames."""
    place, _ = place_of(path)
    return place.is_dir() or (place.is_file() and suffix_of(place) in DICOM)


def content_files(path: Path) -> list[Path]:
    """The files that decide what is read from a path: the file, or all of a folder in the order of names."""
    place, _ = place_of(path)
    return sorted(part for part in place.iterdir() if part.is_file()) if place.is_dir() else [place]


def check_format(path: Path) -> Path:
    """The path, if it is a folder, a series in one, or a file that by its name is a volume.

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
    if suffix not in NIFTI + ITK + DICOM:
        hint = "expected " + ", ".join(NIFTI + ITK) + " or the folder of a DICOM series"
        raise DataError(f"{path}: not a known volume format ({suffix or 'no suffix'}); {hint}")
    return path
