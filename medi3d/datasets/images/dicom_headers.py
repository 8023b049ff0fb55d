"""Classify the objects in a DICOM folder by their headers, without reading pixels."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from medi3d.datasets.images.formats import DICOM
from medi3d.errors import DataError

NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
"""Uncompressed transfer syntaxes."""

TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "SeriesInstanceUID", "SeriesNumber"),
    *("SeriesDescription", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelData"),
]

LOCALIZER_ANGLE = 10.0
"""Degrees: an image rotated further against the slices is a scout; one rotated less is an error."""


@dataclass(frozen=True)
class Instance:
    """A file of a DICOM folder and its header."""

    path: Path
    header: Any  # pydicom.Dataset with `TAGS`

    def text(self, name: str) -> str:
        """The value of an attribute as text, empty if it is missing."""
        return str(self.header.get(name) or "").strip(" \0")

    @cached_property
    def kind(self) -> UID:
        """The SOP class."""
        meta = getattr(self.header, "file_meta", {})
        return UID(self.text("SOPClassUID") or str(meta.get("MediaStorageSOPClassUID") or ""))

    @property
    def is_image(self) -> bool:
        """False only for classes known not to be images: a damaged slice must not pass for one of these."""
        name = self.kind.name
        return name == str(self.kind) or "Image Storage" in name

    @property
    def is_grey(self) -> bool:
        """Whether a pixel has one value."""
        return (self.text("SamplesPerPixel") or "1") == "1"

    @property
    def is_localizer(self) -> bool:
        """Whether the header marks it as a scout image."""
        return "LOCALIZER" in [str(part).upper() for part in self.header.get("ImageType") or ()]

    @property
    def is_multiframe(self) -> bool:
        """Whether the file holds several frames, each with its own position."""
        return "PerFrameFunctionalGroupsSequence" in self.header

    @property
    def frames(self) -> int:
        """Number of frames in the file."""
        return int(self.text("NumberOfFrames") or 1)

    @property
    def is_placed(self) -> bool:
        """Whether the header gives its position."""
        return self.is_multiframe or all(
            self.text(name) for name in ("ImagePositionPatient", "ImageOrientationPatient")
        )

    @property
    def series(self) -> str:
        """SeriesInstanceUID."""
        return self.text("SeriesInstanceUID")

    @property
    def sop(self) -> str:
        """SOPInstanceUID."""
        return self.text("SOPInstanceUID")

    @property
    def plane(self) -> tuple[Any, ...]:
        """Size, spacing and direction, which all slices of a volume share."""
        names = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient")
        return tuple(self.text(name) for name in names)


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Suppress pydicom's warnings about values that violate the standard: what matters is checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_instance(path: Path) -> Instance:
    """A file's header.

    Raises:
        DataError: it is not DICOM, or damaged.
    """
    try:
        with quiet_pydicom():
            header = pydicom.dcmread(path, defer_size=1024, specific_tags=TAGS, force=_is_unmarked(path))
            instance = Instance(path, header)
            for name in TAGS[:-1]:
                header.get(name)  # decodes the value
            if instance.is_image and not (instance.text("Rows") and instance.text("Columns")):
                raise ValueError("no Rows and Columns; is it cut off?")
            _check_pixels(instance)
    except (InvalidDicomError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{path}: no such file") from error
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: this DICOM file cannot be read and would be left out of the series; "
            f"copy it again, or remove it ({reason})"
        ) from error
    return instance


def _check_pixels(instance: Instance) -> None:
    """Raise if uncompressed pixels are missing: GDCM would leave them undefined."""
    header, path = instance.header, instance.path
    if instance.frames > 1 and not instance.is_multiframe:
        return  # refused later, for a better reason
    if not instance.is_image or getattr(header.file_meta, "TransferSyntaxUID", "") not in NATIVE:
        return
    samples, bits = int(instance.text("SamplesPerPixel") or 1), int(instance.text("BitsAllocated") or 16)
    size = (int(header.get("Columns") or 0), int(header.get("Rows") or 0), instance.frames)
    needed = (int(np.prod(size)) * samples * bits + 7) // 8
    stored: Any = header.get_item("PixelData") if "PixelData" in header else None
    length = 0 if stored is None else getattr(stored, "length", None) or len(stored.value or b"")
    begin = getattr(stored, "value_tell", 0) or 0
    held = min(length, path.stat().st_size - begin) if begin else length
    if not needed or not needed <= held <= needed + 1:
        raise DataError(f"{path}: PixelData of {held} bytes where {size} pixels need {needed}; copy it again")


def _is_unmarked(path: Path) -> bool:
    """Whether a file starts with an element of group 2 or 8, as DICOM without the preamble does."""
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:] != b"DICM" and head[1:2] == b"\0" and head[:1] in (b"\x02", b"\x08")


def claims_dicom(path: Path) -> bool:
    """Whether a file claims to be DICOM, by its preamble or its suffix."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM" or path.suffix.lower() in DICOM


def _candidates(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.listdir(folder)):
        path = folder / entry
        if claims_dicom(path):
            yield path
        elif entry.startswith(".") or path.suffix or entry.upper() == "DICOMDIR":
            continue
        elif path.is_file() and _is_unmarked(path):
            yield path


def holds_dicom(folder: Path) -> bool:
    """Whether the folder itself holds DICOM images, readable or not, with or without suffix."""
    for path in _candidates(folder):
        try:
            if read_instance(path).is_image:
                return True
        except DataError:
            return True
    return False


def read_instances(folder: Path) -> list[Instance]:
    """The DICOM objects in a folder, hidden files left out.

    Raises:
        DataError: one cannot be read.
    """
    return [read_instance(path) for path in _candidates(folder)]


def hidden_objects(folder: Path) -> list[Path]:
    """Whether a file is hidden, such as those that macOS creates beside each file on foreign disks."""
    return [folder / entry for entry in sorted(os.listdir(folder)) if entry.startswith("._")]


def numbers(values: Any, count: int, name: str, path: Path) -> np.ndarray:
    """`count` finite numbers of an attribute.

    Raises:
        DataError: there are more, fewer, or other values.
    """
    try:
        found = np.array([float(value) for value in values])
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise DataError(f"{path}: {name} is {str(values)!r}; {count} numbers are needed to place the slice")
    return found


def names_of(paths: Sequence[Path], most: int = 3) -> str:
    """The first file names, and the number of further ones."""
    shown = ", ".join(path.name for path in paths[:most])
    return shown + (f" and {len(paths) - most} more" if len(paths) > most else "")
