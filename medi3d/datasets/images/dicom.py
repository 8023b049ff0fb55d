"""Read a DICOM series as a volume, its geometry taken from the position of each slice.

SliceThickness is never used: slices overlap or leave gaps, and the tag is often a nominal value.
The distance between slices comes only from ImagePositionPatient (0020,0032).
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from pydicom.pixels import pixel_array

from medi3d.datasets.images.dicom_headers import Instance, names_of, quiet_pydicom
from medi3d.datasets.images.dicom_planes import Line, Slice, fit_line, slices_of, sorted_slices
from medi3d.datasets.images.dicom_series import find_series
from medi3d.datasets.images.geometry import set_geometry
from medi3d.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Series:
    """The slices of a volume.

    Attributes:
        path: of the folder, with the choice of a series if there is one.
        slices: in spatial order.
        line: the line on which they lie.
        notes: what was left out, a line each.
    """

    path: Path
    slices: tuple[Slice, ...]
    line: Line
    notes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (columns, rows, slices) as they are in the files."""
        columns, rows = self.slices[0].size
        return columns, rows, len(self.slices)


def read_series(path: Path) -> sitk.Image:
    """A DICOM series as a float32 image (rescaled: HU for CT) in LPS.

    Slices of a tilted gantry are shifted within their planes, so that the grid is rectangular.

    Args:
        path: The folder, FOLDER#NUMBER or FOLDER#UID for one of several series, or a multi-frame file.

    Raises:
        DataError: As `open_series`, or a slice cannot be decoded.
    """
    series = open_series(path)
    for note in series.notes:
        log.warning(note)
    image = sheared_grid(series, _values(series))
    if not series.line.tilt:
        return image
    log.warning(
        "%s: the gantry is tilted by %.1f degrees; slices are read on a straight grid, masks mapped back",
        path,
        series.line.tilt,
    )
    lowest = float(sitk.GetArrayViewFromImage(image).min())
    return sitk.Resample(image, _straight_grid(series), sitk.Transform(), sitk.sitkLinear, lowest)


def series_grid(path: Path) -> sitk.Image:
    """The grid of a series as an empty image, without decoding a slice; rectangular for a tilted gantry.

    Raises:
        DataError: As `open_series`.
    """
    return _straight_grid(open_series(path))


def onto_slices(mask: sitk.Image, path: Path) -> sitk.Image:
    """Map a mask on the grid of a series back onto its slices, which a tilted gantry shears.

    Raises:
        DataError: As `open_series`.
    """
    series = open_series(path)
    if not series.line.tilt:
        return mask
    return sitk.Resample(mask, sheared_grid(series), sitk.Transform(), sitk.sitkNearestNeighbor)


def read_slices(path: Path) -> list[Slice]:
    """The slices of a series in spatial order, checked to form a volume.

    Raises:
        DataError: As `open_series`.
    """
    return list(open_series(path).slices)


def open_series(path: Path) -> Series:
    """Read the headers of a series and check that they form a volume.

    Raises:
        DataError: No series or several; slices missing, duplicated with other content, unreadable or unevenly
            spaced.
    """
    path = Path(path)
    found = find_series(path)
    slices = sorted_slices([one for image in found.images for one in slices_of(image)], path)
    slices, copies = _without_copies(slices, found.images)
    notes = list(found.notes)
    if copies:
        notes.append(f"{path}: {len(copies)} copies of slices left out: {names_of(copies)}")
    return Series(path, tuple(slices), fit_line(slices, path), tuple(notes))


def sheared_grid(series: Series, values: np.ndarray | None = None) -> sitk.Image:
    """The grid of the files in space, (slices, rows, columns); its axes need not be at right angles."""
    image = sitk.GetImageFromArray(values) if values is not None else sitk.Image(series.shape, sitk.sitkUInt8)
    steps, line = series.line.steps(series.slices[0]), series.line
    if not line.tilt:
        set_geometry(image, steps, line.origin, str(series.path))
        return image
    sides = np.linalg.norm(steps, axis=0)
    image.SetSpacing(sides.tolist())
    image.SetDirection((steps / sides).ravel().tolist())
    image.SetOrigin(line.origin.tolist())
    return image


def _straight_grid(series: Series) -> sitk.Image:
    """A rectangular grid with the slices of the files, wide enough for all of them."""
    grid = sheared_grid(series)
    if not series.line.tilt:
        return grid
    first, count = series.slices[0], len(series.slices)
    steps = series.line.steps(first)
    step = first.normal * (series.line.step @ first.normal)
    drift = (series.line.step - step) * (count - 1)
    size, origin = [*series.shape], series.line.origin.copy()
    for axis in (0, 1):
        voxels = float(drift @ steps[:, axis]) / float(steps[:, axis] @ steps[:, axis])
        before = max(0, int(np.ceil(-voxels - 1e-6)))
        size[axis] += before + max(0, int(np.ceil(voxels - 1e-6)))
        origin -= before * steps[:, axis]
    straight = sitk.Image(size, sitk.sitkUInt8)
    set_geometry(straight, np.column_stack([steps[:, :2], step]), origin, str(series.path))
    return straight


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Suppress ITK's own warnings on stderr: what matters is checked and reported once."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def last_line(error: BaseException) -> str:
    """The last line of an error's text: the lines before name ITK's source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _without_copies(slices: Sequence[Slice], images: Sequence[Instance]) -> tuple[list[Slice], list[Path]]:
    """Drop slices with the position and pixels of another slice; return the others and the files dropped."""
    kept, copies = [slices[0]], []
    for one in slices[1:]:
        last = kept[-1]
        if np.linalg.norm(one.position - last.position) > 1e-3 or not _same_pixels(one, last):
            kept.append(one)
        else:
            copies.append(one.path)
    return kept, copies


def _same_pixels(one: Slice, other: Slice) -> bool:
    return np.array_equal(_stored(one), _stored(other)) and (one.slope, one.intercept) == (
        other.slope,
        other.intercept,
    )


def _values(series: Series) -> np.ndarray:
    """(slices, rows, columns) float32, rescaled."""
    if all(one.frame is None for one in series.slices):
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(one.path) for one in series.slices])
        # The slope may differ from slice to slice: the first file's integer type must not be used for all.
        reader.SetOutputPixelType(sitk.sitkFloat32)
        try:
            with quiet_itk():
                return sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError:
            pass  # only pydicom's decoders know newer compressions
    return np.stack([_rescaled(one) for one in series.slices])


def _rescaled(one: Slice) -> np.ndarray:
    return (_stored(one) * np.float64(one.slope) + one.intercept).astype(np.float32)


def _stored(one: Slice) -> np.ndarray:
    """(rows, columns) as stored."""
    try:
        with quiet_pydicom():
            return pixel_array(one.path, index=one.frame or 0)
    except Exception as error:  # decoders raise many kinds of exception
        reason = " ".join(str(error).split())
        lacking = "plugin" in reason or "missing dependencies" in reason
        hint = "; install medi3d[dicom] for its decoders" if lacking else ""
        raise DataError(f"{one.path}: the pixels cannot be decoded{hint} ({reason[:200]})") from error
