"""Read volumes from disk, and write masks on the grid of the file that they belong to.

NIfTI, Analyze and MGH go through nibabel (scaling, qform and sform, oblique and left-handed affines are
kept), NRRD and MetaImage through SimpleITK, a folder is one DICOM series.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medi3d.datasets.images.dicom import last_line, onto_slices, read_series, series_grid
from medi3d.datasets.images.formats import NIBABEL, NIFTI, WRITABLE, check_format, is_series, suffix_of
from medi3d.datasets.images.geometry import grid_difference, is_sheared, set_geometry
from medi3d.datasets.images.itk import read_itk, read_itk_header
from medi3d.datasets.images.nifti import nifti_geometry, open_nifti, read_nifti, write_nifti, write_nifti_like
from medi3d.errors import DataError, ShapeError
from medi3d.files import written_aside

log = logging.getLogger(__name__)


def read_volume(path: Path) -> sitk.Image:
    """Read one 3D image: its stored values, scaled as the header says, on its own grid in LPS.

    Args:
        path: A NIfTI, Analyze, MGH, NRRD or MetaImage file, the folder of a DICOM series (FOLDER#NUMBER or
            FOLDER#UID where it holds several), or a multi-frame DICOM file.

    Raises:
        DataError: The file is missing, empty, damaged, not 3D, sheared, or holds several channels.
    """
    channels = read_channels(path)
    if len(channels) > 1:
        raise DataError(
            f"{path}: a 4D image with {len(channels)} channels or time points, expected one 3D image; "
            "split it, or set the number of channels if it is multi-channel"
        )
    return channels[0]


def read_channels(path: Path) -> list[sitk.Image]:
    """The 3D images in a file, one for each channel (or time point), all on one grid.

    Raises:
        DataError: As `read_volume`, but several channels are allowed.
    """
    path = check_format(path)
    if is_series(path):
        return [read_series(path)]
    return read_nifti(path) if suffix_of(path) in NIBABEL else read_itk(path)


@dataclass(frozen=True)
class VolumeHeader:
    """The size of a volume, from its header.

    Attributes:
        size: voxels (x, y, z).
        spacing: voxel sides in mm.
        channels: 3D images in the file.
        value_bytes: of one voxel once it is read.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    channels: int
    value_bytes: int


def read_header(path: Path) -> VolumeHeader:
    """The size of a volume, without reading its voxels.

    Raises:
        DataError: As `read_channels`, for faults that the header shows.
    """
    path = check_format(path)
    if is_series(path):
        grid = series_grid(path)
        return VolumeHeader(grid.GetSize(), grid.GetSpacing(), 1, 4)
    if suffix_of(path) in NIBABEL:
        source = open_nifti(path)
        steps, _ = nifti_geometry(source, path)
        scaled = source.dataobj.slope != 1 or source.dataobj.inter != 0
        size = (*source.shape, 1, 1, 1)
        return VolumeHeader(
            size[:3],
            tuple(np.linalg.norm(steps, axis=0)),
            int(np.prod(size[3:])),
            8 if scaled else source.get_data_dtype().itemsize,
        )
    reader = read_itk_header(path)
    size = (*reader.GetSize(), 1, 1)
    return VolumeHeader(
        size[:3], (*reader.GetSpacing(), 1.0)[:3], reader.GetNumberOfComponents() * int(np.prod(size[3:])), 8
    )


def read_grid(path: Path) -> sitk.Image:
    """The grid of a volume as an empty image, without reading its voxels.

    Raises:
        DataError: As `read_header`.
    """
    path = check_format(path)
    if is_series(path):
        return series_grid(path)
    if suffix_of(path) in NIBABEL:
        source = open_nifti(path)
        size, (steps, origin) = source.shape[:3], nifti_geometry(source, path)
    else:
        reader = read_itk_header(path)
        size, dimension = reader.GetSize()[:3], reader.GetDimension()
        direction = np.reshape(reader.GetDirection(), (dimension, dimension))[:3, :3]
        steps, origin = direction * reader.GetSpacing()[:3], np.array(reader.GetOrigin()[:3])
    grid = sitk.Image([int(side) for side in size], sitk.sitkUInt8)
    set_geometry(grid, steps, origin, str(path))
    return grid


def write_mask(mask: sitk.Image, like: Path, out: Path) -> None:
    """Write a mask on exactly the grid of the image file that it was made from.

    For a DICOM series with a tilted gantry, the mask lies on the slices and has their sheared affine.

    A NIfTI mask of a NIfTI image copies its affine, qform, sform and their codes exactly.
    The file is written aside and renamed, so that a partial one never looks complete.

    Args:
        mask: Integers, on the grid of `like` (see `restore_mask`).
        like: The image: a file, or the folder of a DICOM series.
        out: Where to write: .nii, .nii.gz, .nrrd or .mha.

    Raises:
        ShapeError: The mask does not lie on the grid of `like`.
        DataError: `out` has another suffix or cannot be written.
    """
    like, out = Path(like), Path(out)
    suffix = suffix_of(out)
    if suffix not in WRITABLE:
        raise DataError(f"{out}: masks are written as {', '.join(WRITABLE)}, not as {suffix or 'no suffix'}")
    difference = grid_difference(mask, read_grid(like))
    if difference:
        raise ShapeError(f"the mask is not on the grid of {like}: {difference}")
    mask = smallest_type(mask)
    if is_series(like):
        mask = onto_slices(mask, like)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(out) as aside:
            if suffix in NIFTI and suffix_of(like) in NIFTI and like.is_file():
                write_nifti_like(mask, like, aside)
            elif suffix in NIFTI and is_sheared(mask):  # ITK would silently straighten it
                write_nifti(mask, aside)
            else:
                sitk.WriteImage(mask, str(aside), useCompression=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{out}: cannot be written: {last_line(error)}") from error


def smallest_type(mask: sitk.Image) -> sitk.Image:
    """The mask as the smallest type that holds its values, unsigned if none is negative."""
    values = sitk.GetArrayViewFromImage(mask)
    highest = int(values.max())
    if int(values.min()) < 0:
        return sitk.Cast(mask, sitk.sitkInt32)
    kind = sitk.sitkUInt8 if highest < 2**8 else sitk.sitkUInt16 if highest < 2**16 else sitk.sitkUInt32
    return sitk.Cast(mask, kind)
