"""Positions of slices: of each from its header, and the line through all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linprog

from medi3d.datasets.images.dicom_headers import Instance, numbers
from medi3d.datasets.images.geometry import SHEAR_TOLERANCE
from medi3d.errors import DataError

STEP_TOLERANCE = 0.02
"""Largest distance of a slice from the fitted line, as a fraction of the step."""

ROUNDING = 0.05
"""mm: this is allowed too, since many systems round positions to one decimal."""

MOST_OF_STEP = 0.2
"""But never a larger fraction: if a slice of four or more is missing, some lie 0.25 steps from any line."""

MOST_TILT = 45.0
"""Degrees; a gantry tilts by 30."""


@dataclass(frozen=True)
class Slice:
    """One slice of a series, and its position."""

    path: Path
    position: np.ndarray  # (3,) centre of the first voxel, mm, LPS
    orientation: np.ndarray  # (6,) direction cosines of a row, then of a column
    size: tuple[int, int]  # columns, rows
    spacing: tuple[float, float]  # mm between columns, between rows
    sop: str = ""  # SOPInstanceUID of its file
    frame: int | None = None  # in a multi-frame file
    slope: float = 1.0
    intercept: float = 0.0
    rounding: float = 0.0  # mm; largest rounding error of the position along an axis

    @property
    def name(self) -> str:
        """The name of its file, and the number of its frame (from 1)."""
        return self.path.name if self.frame is None else f"{self.path.name} frame {self.frame + 1}"

    @property
    def normal(self) -> np.ndarray:
        """(3,) unit vector."""
        return np.cross(self.orientation[:3], self.orientation[3:])


@dataclass(frozen=True)
class Line:
    """The line through the first voxels of evenly spaced slices.

    Attributes:
        origin: (3,) mm, LPS.
        step: (3,) mm from one slice to the next.
        tilt: degrees between the step and the normal of the slices; 0 if they are perpendicular.
    """

    origin: np.ndarray
    step: np.ndarray
    tilt: float

    def steps(self, first: Slice) -> np.ndarray:
        """(3, 3); column i is the step in mm along columns, rows, slices."""
        row, column = first.orientation[:3] * first.spacing[0], first.orientation[3:] * first.spacing[1]
        return np.stack([row, column, self.step], axis=1)


def slices_of(image: Instance) -> list[Slice]:
    """The slice in a file, or the frames of a multi-frame file.

    Raises:
        DataError: a position is missing or impossible, or the image is in colour.
    """
    if not image.is_grey:
        raise DataError(f"{image.path}: a colour image; a volume needs one value per pixel")
    if not image.is_multiframe:
        if image.frames > 1:
            raise DataError(
                f"{image.path}: a multi-frame DICOM file ({image.kind.name}) that does not give the "
                "position of each frame; convert it to NIfTI, for example with dcm2niix"
            )
        header = image.header
        return [_slice(image, place=header, plane=header, measures=header, values=header, frame=None)]
    shared = (image.header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    frames = image.header.PerFrameFunctionalGroupsSequence
    if len(frames) != image.frames:
        raise DataError(f"{image.path}: {image.frames} frames, but {len(frames)} groups that describe them")
    return [
        _slice(
            image,
            place=_group(frame, shared, "PlanePositionSequence"),
            plane=_group(frame, shared, "PlaneOrientationSequence"),
            measures=_group(frame, shared, "PixelMeasuresSequence"),
            values=_group(frame, shared, "PixelValueTransformationSequence"),
            frame=number,
        )
        for number, frame in enumerate(frames)
    ]


def _group(frame: Any, shared: Any, name: str) -> Any:
    """A functional group of a frame, or the one that all frames share."""
    return (frame.get(name) or shared.get(name) or [{}])[0]


def _slice(
    image: Instance, *, place: Any, plane: Any, measures: Any, values: Any, frame: int | None
) -> Slice:
    path = image.path if frame is None else Path(f"{image.path} (frame {frame + 1})")
    orientation = numbers(plane.get("ImageOrientationPatient"), 6, "ImageOrientationPatient", path)
    lengths = np.linalg.norm(orientation.reshape(2, 3), axis=1)
    if not np.allclose(lengths, 1, atol=0.01):
        raise DataError(
            f"{path}: ImageOrientationPatient has directions of length {lengths.round(3).tolist()}, not 1"
        )
    cosine = float(orientation[:3] @ orientation[3:])
    if abs(cosine) > 0.01:
        raise DataError(
            f"{path}: ImageOrientationPatient has a cosine of {cosine:.3g} between rows and columns"
        )
    between_rows, between_columns = numbers(measures.get("PixelSpacing"), 2, "PixelSpacing", path)
    if min(between_rows, between_columns) <= 0:
        raise DataError(
            f"{path}: PixelSpacing is {[between_rows, between_columns]}; each side must be greater than 0"
        )
    stored = place.get("ImagePositionPatient")
    return Slice(
        path=image.path,
        position=numbers(stored, 3, "ImagePositionPatient", path),
        orientation=orientation,
        size=(int(image.header.Columns), int(image.header.Rows)),
        spacing=(float(between_columns), float(between_rows)),
        sop=image.sop,
        frame=frame,
        slope=float(values.get("RescaleSlope", 1) if values.get("RescaleSlope") is not None else 1),
        intercept=float(values.get("RescaleIntercept") or 0),
        rounding=0.5 * 10.0 ** -max(_decimals(value) for value in stored),
    )


def _decimals(value: Any) -> int:
    """Number of decimals with which a number is written in the file."""
    text = str(getattr(value, "original_string", value)).strip().lower()
    mantissa, _, power = text.partition("e")
    return max(0, len(mantissa.partition(".")[2].rstrip("0")) - int(power or 0))


def sorted_slices(slices: Sequence[Slice], path: Path) -> list[Slice]:
    """Slices in the order of their position along their normal.

    Raises:
        DataError: there are fewer than two, or they differ in size or spacing, or are not parallel.
    """
    if len(slices) < 2:
        raise DataError(f"{path}: the series has one slice; a volume needs two or more")
    first = slices[0]
    for other in slices[1:]:
        if other.size != first.size or not np.allclose(other.spacing, first.spacing, rtol=1e-3):
            raise DataError(
                f"{other.path}: {other.size} pixels of {other.spacing} mm where {first.path.name} has "
                f"{first.size} of {first.spacing}; slices of one volume must agree"
            )
        if not np.allclose(other.orientation, first.orientation, atol=1e-3):
            raise DataError(
                f"{other.path}: not parallel to {first.path.name}; slices of one volume are parallel "
                "(a scout image in the folder?)"
            )
    return sorted(slices, key=lambda one: (float(one.position @ first.normal), len(one.path.name)))


def fit_line(slices: Sequence[Slice], path: Path) -> Line:
    """The line on which evenly spaced slices lie.

    Raises:
        DataError: two have the same position, one is missing, or they do not lie on a line.
    """
    first, count = slices[0], len(slices)
    if count < 2:
        raise DataError(f"{path}: the series has one slice; a volume needs two or more")
    places = np.stack([one.position for one in slices])
    along = places @ first.normal
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    pairs = [f"between {a.name} and {b.name}" for a, b in pairwise(slices)]
    closest, oddest = int(gaps.argmin()), int(np.abs(gaps - usual).argmax())
    if gaps[closest] < 1e-3 * min(1.0, usual or 1.0):
        raise DataError(
            f"{path}: no distance {pairs[closest]}: several acquisitions (times, echoes) in one series"
        )
    rounding = max(ROUNDING, min(one.rounding for one in slices) * float(np.abs(first.normal).sum()))
    allowed = max(STEP_TOLERANCE * usual, min(rounding, MOST_OF_STEP * usual))
    step, start = (places[-1] - places[0]) / (count - 1), places[0]
    if np.abs(places - start - np.arange(count)[:, None] * step).max() > 1e-3 * usual:
        step, start = np.polyfit(np.arange(count), places, 1)
    beside = places - (start + np.arange(count)[:, None] * step)
    if np.abs(beside @ first.normal).max() > allowed and _distance_to_any_line(along) > allowed + 1e-6:
        raise DataError(
            f"{path}: uneven slices, {gaps[oddest]:.3f} mm {pairs[oddest]} where {usual:.3f} mm is usual: "
            "is a slice missing? A volume needs all of them, evenly spaced"
        )
    lateral = np.linalg.norm(beside - np.outer(beside @ first.normal, first.normal), axis=1)
    farthest = int(lateral.argmax())
    if lateral[farthest] > max(STEP_TOLERANCE * usual, 2 * rounding, 0.1 * min(first.spacing)):
        raise DataError(
            f"{path}: {slices[farthest].name} lies {lateral[farthest]:.3g} mm to the side of the line of the "
            "others; slices of one volume must be stacked on a line"
        )
    return _straightened(step, start, first, count, rounding, path)


def _straightened(
    step: np.ndarray, start: np.ndarray, first: Slice, count: int, rounding: float, path: Path
) -> Line:
    """The line; along the normal if that is within the rounding of the positions."""
    upright = first.normal * (step @ first.normal)
    drift = float(np.linalg.norm(step - upright))
    tilt = float(np.degrees(np.arctan2(drift, np.linalg.norm(upright))))
    if tilt > MOST_TILT:
        raise DataError(
            f"{path}: sheared by {tilt:.0f} degrees, more than any gantry tilts; are the positions right?"
        )
    if drift * (count - 1) <= 2 * rounding:
        return Line(start, upright if np.tan(np.radians(tilt)) > SHEAR_TOLERANCE / 10 else step, 0.0)
    return Line(start, step, tilt if np.tan(np.radians(tilt)) > SHEAR_TOLERANCE else 0.0)


def _distance_to_any_line(places: np.ndarray) -> float:
    """The smallest maximum difference of evenly spaced numbers from `places` (Chebyshev distance)."""
    ones, index = np.ones(len(places)), np.arange(len(places), dtype=float)
    upper, lower = np.stack([ones, index, -ones], 1), np.stack([-ones, -index, -ones], 1)
    sides = np.concatenate([places, -places])
    solved = linprog([0, 0, 1], np.concatenate([upper, lower]), sides, bounds=(None, None))
    return float(solved.fun)
