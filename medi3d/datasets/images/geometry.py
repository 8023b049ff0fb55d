"""Image geometry: spacing, direction and origin from an affine, and a comparison of two grids.

Physical space is LPS in millimetres, as in DICOM and SimpleITK: x grows to the patient's left,
y to posterior, z to superior. NIfTI's RAS is converted when the file is read.
"""

from itertools import product

import numpy as np
import SimpleITK as sitk

from medi3d.errors import DataError

SHEAR_TOLERANCE = 1e-3
"""Largest cosine between two voxel axes that should stand at right angles (0.06 degrees)."""

GRID_TOLERANCE = 0.05
"""Two grids are equal if no corner differs by more than this fraction of the smallest voxel side.

Headers hold float32 numbers, and quaternions rounded twice: equal scans differ by thousandths."""


def set_geometry(image: sitk.Image, steps: np.ndarray, origin: np.ndarray, name: str) -> None:
    """Set spacing, direction and origin of `image`, in place.

    Args:
        image: A 3D image.
        steps: (3, 3); column i is the step in mm, in LPS, from one voxel to the next along array axis i.
        origin: (3,) centre of the first voxel in mm, in LPS.
        name: The file, for the message.

    Raises:
        DataError: The axes are sheared, degenerate or not finite: no image grid is like that.
    """
    if not (np.isfinite(steps).all() and np.isfinite(origin).all()):
        raise DataError(f"{name}: the affine holds NaN or infinite numbers; the file's header is damaged")
    spacing = np.linalg.norm(steps, axis=0)
    if spacing.min() < 1e-6:
        raise DataError(
            f"{name}: the affine gives voxels of {_triple(spacing)} mm; each side must be greater than 0"
        )
    cosines = steps / spacing
    shear = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if shear > SHEAR_TOLERANCE:
        raise DataError(
            f"{name}: the affine is sheared (cosine {shear:.3g} between two axes, at most {SHEAR_TOLERANCE} "
            "is accepted as rounding); resample it to a rectangular grid first (gantry tilt?)"
        )
    image.SetSpacing([float(side) for side in spacing])
    image.SetDirection(cosines.ravel().tolist())
    image.SetOrigin([float(place) for place in origin])


def is_sheared(image: sitk.Image) -> bool:
    """Whether two axes are not at right angles."""
    cosines = np.reshape(image.GetDirection(), (3, 3))
    return bool(np.abs(cosines.T @ cosines - np.eye(3)).max() > SHEAR_TOLERANCE)


def grid_difference(first: sitk.Image, second: sitk.Image) -> str:
    """How the grids of two images differ, in words; empty if they are the same voxels in space."""
    if first.GetSize() != second.GetSize():
        return f"shape {first.GetSize()} against {second.GetSize()} voxels (x, y, z)"
    apart = np.linalg.norm(corners(first) - corners(second), axis=1).max()
    smallest = min(*first.GetSpacing(), *second.GetSpacing())
    if apart <= GRID_TOLERANCE * smallest:
        return ""
    return (
        f"the grids lie up to {apart:.3g} mm apart: spacing {_triple(first.GetSpacing())} against "
        f"{_triple(second.GetSpacing())}, origin {_triple(first.GetOrigin())} against "
        f"{_triple(second.GetOrigin())} mm, or other directions"
    )


def corners(image: sitk.Image) -> np.ndarray:
    """(8, 3) centres of the corner voxels, in mm, in LPS."""
    last = [size - 1 for size in image.GetSize()]
    return np.array([image.TransformIndexToPhysicalPoint(c) for c in product(*((0, n) for n in last))])


def spacing_dhw(image: sitk.Image) -> tuple[float, float, float]:
    """Voxel sides of a canonical image in mm, in the order of the array: (depth, height, width)."""
    width, height, depth = image.GetSpacing()
    return (depth, height, width)


def _triple(values: np.ndarray | tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
