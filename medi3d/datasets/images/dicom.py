"""One DICOM series as a volume, its geometry taken from where each slice says that it lies.

SliceThickness is never used: slices overlap or leave gaps, and the tag is often a nominal value.
The distance between slices comes from ImagePositionPatient (0020,0032) alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medi3d.datasets.images.geometry import set_geometry
from medi3d.errors import DataError

POSITION, ORIENTATION, FRAMES = "0020|0032", "0020|0037", "0028|0008"
SPACING, SAMPLES, BITS = "0028|0030", "0028|0002", "0028|0100"
PIXELS = bytes.fromhex("e07f1000")
NATIVE = {"1.2.840.10008.1.2": 4, "1.2.840.10008.1.2.1": 8}
"""Uncompressed little-endian transfer syntax -> where the length of an element stands behind its tag."""

STEP_TOLERANCE = 0.02
"""Steps between slices may differ by this part of the usual step: positions are rounded in the files."""


@dataclass(frozen=True)
class Slice:
    """One file of a series, and where it lies."""

    path: Path
    position: np.ndarray  # (3,) centre of the first voxel, mm, LPS
    orientation: np.ndarray  # (6,) direction cosines of a row, then of a column
    size: tuple[int, ...]  # columns, rows
    spacing: tuple[float, ...]  # mm between columns, between rows


def read_series(folder: Path) -> sitk.Image:
    """The DICOM series in `folder` as a float32 image (rescaled: HU for CT) in LPS.

    Raises:
        DataError: As `read_slices`, or a slice cannot be decoded.
    """
    slices = read_slices(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(one.path) for one in slices])
    # The slope may differ from slice to slice: the first file's integer type must not decide for all.
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        with quiet_itk():
            image = reader.Execute()
    except RuntimeError as error:
        raise DataError(f"{folder}: the DICOM series cannot be decoded: {last_line(error)}") from error
    _place(image, slices, folder)
    return image


def series_grid(folder: Path) -> sitk.Image:
    """The grid of the series in `folder` as an empty image, no slice decoded.

    Raises:
        DataError: As `read_slices`.
    """
    slices = read_slices(folder)
    grid = sitk.Image([*slices[0].size, len(slices)], sitk.sitkUInt8)
    _place(grid, slices, folder)
    return grid


def read_slices(folder: Path) -> list[Slice]:
    """The slices of the one series in `folder`, in the order in which they lie, checked to be a volume.

    Raises:
        DataError: No series or several, slices missing, doubled, unreadable or unevenly spaced,
            a multi-frame file, or a tilted gantry.
    """
    folder = Path(folder)
    with quiet_itk():
        slices = _sorted_slices([_read_slice(path) for path in _series_files(folder)], folder)
    _check_steps(slices, folder)
    return slices


def _place(image: sitk.Image, slices: Sequence[Slice], folder: Path) -> None:
    first, last = slices[0], slices[-1]
    row, column = first.orientation[:3] * first.spacing[0], first.orientation[3:] * first.spacing[1]
    step = (last.position - first.position) / (len(slices) - 1)
    set_geometry(image, np.stack([row, column, step], axis=1), first.position, str(folder))


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Keeps ITK from writing warnings of its own to stderr: what matters is checked, and said once."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def last_line(error: BaseException) -> str:
    """The last line of an error's text: ITK puts its own source files into the lines before."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _series_files(folder: Path) -> list[Path]:
    series = {
        name: [Path(file) for file in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), name)]
        for name in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    }
    if not series:
        raise DataError(f"{folder}: no DICOM series in this folder; give the folder that holds the slices")
    if len(series) > 1:
        found = ", ".join(f"{name or 'unnamed'} ({len(files)} files)" for name, files in series.items())
        raise DataError(
            f"{folder}: {len(series)} DICOM series in one folder, give each its own folder: {found}"
        )
    files = next(iter(series.values()))
    unread = sorted(path for path in folder.iterdir() if path not in set(files) and claims_dicom(path))
    if unread:
        raise DataError(
            f"{unread[0]}: this DICOM file cannot be read and would be left out of the series "
            f"({len(unread)} such files); copy it again, or take it away"
        )
    return files


def holds_dicom(folder: Path) -> bool:
    """Whether DICOM files lie in the folder itself, readable or not, with suffix or without."""
    if any(claims_dicom(path) for path in folder.iterdir()):
        return True
    with quiet_itk():  # old files lack the mark in front
        return bool(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def claims_dicom(path: Path) -> bool:
    """Whether a file says that it is a DICOM slice, by the mark in front or by its suffix."""
    if not path.is_file() or path.name.upper() == "DICOMDIR":
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".ima")


def _read_slice(path: Path) -> Slice:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path}: not a readable DICOM file: {last_line(error)}") from error
    if reader.HasMetaDataKey(FRAMES) and int(reader.GetMetaData(FRAMES)) > 1:
        raise DataError(
            f"{path}: a multi-frame DICOM file; only series with one slice a file are read "
            "(convert it to NIfTI, for example with dcm2niix)"
        )
    if int(_text(reader, SAMPLES) or 1) != 1:
        raise DataError(f"{path}: a colour image; a series of a volume has one value a pixel")
    orientation = _numbers(reader, ORIENTATION, 6, "ImageOrientationPatient")
    lengths = np.linalg.norm(orientation.reshape(2, 3), axis=1)
    if not np.allclose(lengths, 1, atol=0.01):
        raise DataError(
            f"{path}: ImageOrientationPatient has directions of length {lengths.round(3).tolist()}; 1 is due"
        )
    spacing = _numbers(reader, SPACING, 2, "PixelSpacing")
    if not (spacing > 0).all():
        raise DataError(f"{path}: PixelSpacing is {spacing.tolist()}; each side must be greater than 0")
    size = tuple(reader.GetSize()[:2])
    _check_length(path, size, int(_text(reader, BITS) or 16))
    position = _numbers(reader, POSITION, 3, "ImagePositionPatient")
    return Slice(path, position, orientation, size, tuple(reader.GetSpacing()[:2]))


def _check_length(path: Path, size: tuple[int, ...], bits: int) -> None:
    """Refuse a file whose uncompressed pixels are fewer than it says: GDCM would leave the rest to chance."""
    data = path.read_bytes()
    place = NATIVE.get(_transfer_syntax(data))
    if place is None:
        return
    due, at, lengths = size[0] * size[1] * bits // 8, data.find(PIXELS), []
    while at >= 0:  # the tag may also stand in a preview, or by chance among the pixels
        lengths.append(int.from_bytes(data[at + place : at + place + 4], "little"))
        at = data.find(PIXELS, at + 1)
    if not any(due <= length <= due + 1 for length in lengths):
        raise DataError(
            f"{path}: PixelData of {lengths[:3]} bytes where {size} pixels need {due}; copy it again"
        )


def _transfer_syntax(data: bytes) -> str:
    """From the file's meta information, which SimpleITK keeps to itself; empty where there is none."""
    at = data.find(bytes.fromhex("02001000") + b"UI", 132, 1024)
    length = int.from_bytes(data[at + 6 : at + 8], "little")
    return data[at + 8 : at + 8 + length].decode("latin-1").strip(" \0") if at >= 0 else ""


def _text(reader: sitk.ImageFileReader, tag: str) -> str:
    return reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""


def _numbers(reader: sitk.ImageFileReader, tag: str, count: int, name: str) -> np.ndarray:
    text = _text(reader, tag)
    try:
        numbers = np.array([float(part) for part in text.split("\\")])
    except ValueError:
        numbers = np.empty(0)
    if numbers.shape != (count,):
        raise DataError(
            f"{reader.GetFileName()}: {name} is {text!r}; {count} numbers are needed to place the slice"
        )
    return numbers


def _sorted_slices(slices: Sequence[Slice], folder: Path) -> list[Slice]:
    if len(slices) < 2:
        raise DataError(f"{folder}: the series has one slice; a volume needs two or more")
    first = slices[0]
    for other in slices[1:]:
        if other.size != first.size or not np.allclose(other.spacing, first.spacing, rtol=1e-3):
            raise DataError(
                f"{other.path}: {other.size} pixels of {other.spacing} mm where {first.path.name} has "
                f"{first.size} of {first.spacing}; slices of one volume are alike"
            )
        if not np.allclose(other.orientation, first.orientation, atol=1e-3):
            raise DataError(
                f"{other.path}: turned against {first.path.name}; slices of one volume are parallel "
                "(a scout image in the folder?)"
            )
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    return sorted(slices, key=lambda one: float(one.position @ normal))


def _check_steps(slices: Sequence[Slice], folder: Path) -> None:
    places = np.stack([one.position for one in slices])
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    usual = float(np.median(steps))
    pairs = [f"between {a.path.name} and {b.path.name}" for a, b in pairwise(slices)]
    closest, oddest = int(steps.argmin()), int(np.abs(steps - usual).argmax())
    if steps[closest] < 1e-3:
        raise DataError(
            f"{folder}: no distance {pairs[closest]}: several acquisitions (times, echoes) in one series"
        )
    if abs(steps[oddest] - usual) > STEP_TOLERANCE * usual:
        raise DataError(
            f"{folder}: uneven slices, {steps[oddest]:.3f} mm {pairs[oddest]} where {usual:.3f} mm is usual: "
            "is a slice missing? A volume needs all of them, evenly spaced"
        )
