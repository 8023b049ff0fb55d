"""File formats of images, by suffix."""

from pathlib import Path

from medi3d.errors import DataError

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
WRITABLE = (*NIFTI, ".nrrd", ".mha")
"""One file each: a mask with a separate data file could not be renamed into place in one step."""


def suffix_of(path: Path) -> str:
    """The file's ending in lower case, `.nii.gz` in one piece."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def check_format(path: Path) -> Path:
    """The path, if it is a folder or a file that by its name is a volume.

    Raises:
        DataError: It is missing, empty, or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        return path
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    suffix = suffix_of(path)
    if suffix not in NIFTI + ITK:
        dicom = suffix in (".dcm", ".ima")
        hint = "give the folder of the series" if dicom else "expected " + ", ".join(NIFTI + ITK)
        raise DataError(f"{path}: not a known volume format ({suffix or 'no suffix'}); {hint}")
    return path
