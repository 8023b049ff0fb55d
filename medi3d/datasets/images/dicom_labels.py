"""Read labels from DICOM Segmentations and RT Structure Sets onto the voxels of their image.

Contours are filled here: rt-utils has had no release since January 2023 and needs
opencv-python, platipy needs pydicom below 3.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from matplotlib.path import Path as Polygon

from medi3d.datasets.images.dicom_headers import claims_dicom, numbers, quiet_pydicom
from medi3d.errors import DataError

log = logging.getLogger(__name__)

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""SOP classes: Segmentation and Label Map Segmentation."""

STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"

BETWEEN_SLICES = 0.2
"""Largest distance of a frame or contour from a slice, as a fraction of the step: positions are rounded."""

ON_LINE = 1e-3
"""Voxels: many programs draw contours through the centres of the outermost voxels of a structure."""

BESIDE_VOXELS = 0.05
"""Voxels within a slice by which a frame may be shifted without a warning."""


def read_dicom_labels(
    path: Path,
    labels: Mapping[str, int],
    like: sitk.Image | None,
    *,
    order: Sequence[str] = (),
    may_lack: bool = False,
) -> sitk.Image:
    """A DICOM Segmentation or RT Structure Set as a label map of unsigned integers.

    A segment or structure is matched to a label by name, whatever its number; where no name fits a segment,
    its number counts as the label's value. Others are ignored.

    Args:
        path: The file.
        labels: Name of a label -> value in the map.
        like: Grid of the image that it was drawn on.
        order: Names; where segments overlap, the later one wins. Empty: overlaps are an error.
        may_lack: Treat a label without a segment as absent; otherwise that is an error.

    Raises:
        DataError: It is another kind of object, is not on the voxels of the image, lacks a label, or labels
            overlap.
    """
    header = _read(path)
    if like is None:
        raise DataError(f"{path}: labels from DICOM need their image, which is not given here")
    grid = _Grid(like, path)
    if str(header.SOPClassUID) == STRUCTURES:
        masks = _structures(header, labels, grid, may_lack)
    else:
        masks = _segments(header, labels, grid, may_lack)
    joined = np.zeros(like.GetSize()[::-1], np.min_scalar_type(max(labels.values())))
    for name in order or labels:
        if name not in masks:
            continue
        inside = masks[name]
        both = 0 if order else int(np.count_nonzero(joined[inside]))
        if both:
            raise DataError(
                f"{path}: {both} voxels are {name} and another label too; say with data.overlaps, a list of "
                "all labels, which wins (the later one)"
            )
        joined[inside] = labels[name]
    image = sitk.GetImageFromArray(joined)
    image.CopyInformation(like)
    return image


def dicom_label_file(path: Path) -> Path | None:
    """The DICOM Segmentation or RT Structure Set at a path: the file, or the only one in a folder."""
    if path.is_dir():
        files = [one for one in sorted(path.iterdir()) if claims_dicom(one)]
        return dicom_label_file(files[0]) if len(files) == 1 else None
    if not claims_dicom(path):
        return None
    try:
        with quiet_pydicom():
            return path if _is_labels(pydicom.dcmread(path, specific_tags=["SOPClassUID"])) else None
    except Exception:  # damaged: reported when it is read
        return None


def _is_labels(header: Any) -> bool:
    return str(header.get("SOPClassUID")) in (*SEGMENTATIONS, STRUCTURES)


def _read(path: Path) -> Any:
    try:
        with quiet_pydicom():
            header = pydicom.dcmread(path)
    except Exception as error:  # pydicom raises many things on damaged files
        raise DataError(f"{path}: damaged or not DICOM: {' '.join(str(error).split())}") from error
    if not _is_labels(header):
        raise DataError(f"{path}: neither a DICOM Segmentation nor an RT Structure Set")
    return header


class _Grid:
    """The voxel grid of an image, and points in space in its coordinates."""

    def __init__(self, image: sitk.Image, path: Path) -> None:
        self.size = np.array(image.GetSize())
        self.path = path
        steps = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        self._inverse, self._origin = np.linalg.inv(steps), np.array(image.GetOrigin())

    def place(self, points: np.ndarray) -> np.ndarray:
        """(n, 3) mm in LPS -> (n, 3) voxels (x, y, z), not rounded."""
        return (points - self._origin) @ self._inverse.T

    def turn(self, step: np.ndarray) -> np.ndarray:
        """(3,) mm -> (3,) voxels."""
        return self._inverse @ step


def _named(found: Mapping[str, Any], labels: Mapping[str, int], may_lack: bool, path: Path) -> dict[str, Any]:
    """The object found for each label; names are compared ignoring case."""
    folded = {name.strip().casefold(): name for name in found}
    lacking = [name for name in labels if name.strip().casefold() not in folded]
    if lacking and not (may_lack and len(lacking) < len(labels)):
        raise DataError(
            f"{path}: no segment named {', '.join(lacking)} (there are {', '.join(found) or 'none'}); name "
            "the labels like these, or allow absent labels with data.empty_labels: true"
        )
    return {
        name: found[folded[name.strip().casefold()]] for name in labels if name.strip().casefold() in folded
    }


# ------------------------------------------------------------------------------------- Segmentation


def _segments(seg: Any, labels: Mapping[str, int], grid: _Grid, may_lack: bool) -> dict[str, np.ndarray]:
    numbers_of: dict[str, set[int]] = {}
    for segment in seg.get("SegmentSequence") or ():
        numbers_of.setdefault(str(segment.get("SegmentLabel") or ""), set()).add(int(segment.SegmentNumber))
    known = {number for found in numbers_of.values() for number in found} - {0}
    own, theirs = ({name.strip().casefold() for name in names} for names in (labels, numbers_of))
    if not own & theirs and known <= set(labels.values()):
        numbers_of = {name: {value} for name, value in labels.items() if value in known or may_lack}
    wanted = _named(numbers_of, labels, may_lack, grid.path)
    masks = {name: np.zeros(grid.size[::-1], bool) for name in wanted}
    moved = 0.0
    for pixels, number, corner, steps in _frames(seg, grid.path):
        for name, of_name in wanted.items():
            inside = np.isin(pixels, list(of_name)) if number is None else pixels * (number in of_name)
            if inside.any():
                moved = max(moved, _lay(inside, corner, steps, grid, masks[name]))
    if moved > BESIDE_VOXELS:
        log.warning(
            "%s: its pixels lie up to %.2f of a voxel from those of the image; the nearest are used",
            grid.path,
            moved,
        )
    return masks


def _frames(seg: Any, path: Path) -> Iterator[tuple[np.ndarray, int | None, np.ndarray, np.ndarray]]:
    """Frames of a segmentation: pixels, number of the segment, first pixel, steps of columns and rows (2, 3).

    The pixels of a segment's frame are 0 and 1; of a label map they are numbers of segments, and the number
    is None.
    """
    try:
        with quiet_pydicom():
            stored = seg.pixel_array.reshape(-1, int(seg.Rows), int(seg.Columns))
    except Exception as error:  # decoders raise what they like
        raise DataError(f"{path}: the pixels cannot be decoded: {' '.join(str(error).split())}") from error
    kind = str(seg.get("SegmentationType") or "BINARY")
    if kind == "FRACTIONAL":
        stored = stored >= 0.5 * float(seg.get("MaximumFractionalValue") or 255)
    shared = (seg.get("SharedFunctionalGroupsSequence") or [{}])[0]

    def group(frame: Any, name: str) -> Any:
        return (frame.get(name) or shared.get(name) or [{}])[0]

    for pixels, frame in zip(stored, seg.PerFrameFunctionalGroupsSequence, strict=True):
        identified = group(frame, "SegmentIdentificationSequence").get("ReferencedSegmentNumber")
        corner = numbers(
            group(frame, "PlanePositionSequence").get("ImagePositionPatient"), 3, "ImagePositionPatient", path
        )
        turned = group(frame, "PlaneOrientationSequence").get("ImageOrientationPatient")
        row, column = numbers(turned, 6, "ImageOrientationPatient", path).reshape(2, 3)
        spacing = group(frame, "PixelMeasuresSequence").get("PixelSpacing")
        between_rows, between_columns = numbers(spacing, 2, "PixelSpacing", path)
        steps = np.stack([row * between_columns, column * between_rows])
        is_map = kind == "LABELMAP" or identified is None
        yield pixels if is_map else pixels > 0, None if is_map else int(identified), corner, steps


def _lay(inside: np.ndarray, corner: np.ndarray, steps: np.ndarray, grid: _Grid, mask: np.ndarray) -> float:
    """Set the voxels of a frame, which may have other axes than the image, be flipped or cropped.

    Returns:
        The distance of its pixels from the centres of voxels, in voxels.
    """
    rows, columns = inside.nonzero()
    across, down = (grid.turn(step) for step in steps)
    whole = np.round([across, down])
    drift = np.abs(np.stack([across, down]) - whole).max() * max(inside.shape)
    if np.abs(whole).sum(axis=1).tolist() != [1, 1] or drift > 0.5:
        raise DataError(
            f"{grid.path}: its pixels are not those of the image: {_triple(across)} and {_triple(down)} "
            "voxels from one to the next; resample one of them"
        )
    first = grid.place(corner[None])[0]
    # The position is taken at the centre of the frame, where rounded directions drift least.
    middle = np.array([(inside.shape[1] - 1) // 2, (inside.shape[0] - 1) // 2])
    centre = first + middle[0] * across + middle[1] * down
    start = np.round(centre)
    beside = np.abs(centre - start)
    through = int(np.flatnonzero(np.abs(whole).sum(axis=0) == 0)[0])
    if beside[through] > BETWEEN_SLICES:
        raise DataError(
            f"{grid.path}: a frame lies {beside[through]:.2f} of a step between two slices of the image"
        )
    voxels = (
        start + (columns - middle[0])[:, None] * whole[0] + (rows - middle[1])[:, None] * whole[1]
    ).astype(int)
    outside = ~((voxels >= 0) & (voxels < grid.size)).all(axis=1)
    if outside.any():
        raise DataError(
            f"{grid.path}: {int(outside.sum())} labelled pixels of a frame lie outside of the image"
        )
    mask[voxels[:, 2], voxels[:, 1], voxels[:, 0]] = True
    return float(beside.max())


def _triple(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"


# ------------------------------------------------------------------------------------- RT Structure Set


def _structures(header: Any, labels: Mapping[str, int], grid: _Grid, may_lack: bool) -> dict[str, np.ndarray]:
    names = {
        int(roi.ROINumber): str(roi.get("ROIName") or "")
        for roi in header.get("StructureSetROISequence") or ()
    }
    contours: dict[str, list[Any]] = {name: [] for name in names.values()}
    for roi in header.get("ROIContourSequence") or ():
        contours.setdefault(names.get(int(roi.ReferencedROINumber), ""), []).extend(
            roi.get("ContourSequence") or ()
        )
    wanted = _named(contours, labels, may_lack, grid.path)
    return {name: _filled(found, name, grid) for name, found in wanted.items()}


def _filled(contours: Sequence[Any], name: str, grid: _Grid) -> np.ndarray:
    """Voxels whose centre lies inside or on the closed contours of their slice; holes are left out."""
    mask = np.zeros(grid.size[::-1], bool)
    planes: dict[int, list[np.ndarray]] = {}
    for contour in contours:
        if str(contour.get("ContourGeometricType") or "").startswith("CLOSED_PLANAR"):
            slice_, points = _placed(contour, name, grid)
            planes.setdefault(slice_, []).append(points)
    outside = sum(len(found) for slice_, found in planes.items() if not 0 <= slice_ < grid.size[2])
    if outside:
        log.warning("%s: %d contours of %s lie outside of the image; left out", grid.path, outside, name)
    for slice_, found in planes.items():
        if 0 <= slice_ < grid.size[2]:
            for points in sorted(found, key=_area, reverse=True):
                _fill(points, mask[slice_])
    return mask


def _placed(contour: Any, name: str, grid: _Grid) -> tuple[int, np.ndarray]:
    """The slice of a contour, and its points (n, 2) in voxels."""
    data = contour.get("ContourData")
    if data is None or len(data) % 3 or len(data) < 3:
        raise DataError(
            f"{grid.path}: a contour of {name} has {len(data or ())} numbers; expected three per point"
        )
    points = grid.place(numbers(data, len(data), "ContourData", grid.path).reshape(-1, 3))
    slice_ = round(float(np.median(points[:, 2])))
    if np.abs(points[:, 2] - slice_).max() > BETWEEN_SLICES:
        raise DataError(
            f"{grid.path}: a contour of {name} lies between or across the slices of the image (from slice "
            f"{points[:, 2].min():.2f} to {points[:, 2].max():.2f}); was it drawn on another series?"
        )
    return slice_, points[:, :2]


def _area(points: np.ndarray) -> float:
    x, y = (points - points[0]).T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def _fill(points: np.ndarray, plane: np.ndarray) -> None:
    """Fill a contour; one inside a filled region is a hole, whose border belongs to the structure."""
    low = np.maximum(np.ceil(points.min(axis=0) - ON_LINE).astype(int), 0)
    high = np.minimum(np.floor(points.max(axis=0) + ON_LINE).astype(int) + 1, plane.shape[::-1])
    if (low >= high).any():
        return
    x, y = np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1]))
    middles = np.stack([x.ravel(), y.ravel()], axis=1)
    # The sign of the radius that widens a polygon depends on its orientation.
    either = [
        Polygon(points).contains_points(middles, radius=r).reshape(x.shape) for r in (ON_LINE, -ON_LINE)
    ]
    wide, narrow = either[0] | either[1], either[0] & either[1]
    crop = plane[low[1] : high[1], low[0] : high[0]]
    if narrow.any() and crop[narrow].mean() > 0.5:
        crop &= ~narrow
    else:
        crop |= wide
