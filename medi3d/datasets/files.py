"""Volumes read from disk, and masks written back onto the grid of the file that they belong to.

NIfTI goes through nibabel (scaling, qform and sform, oblique and left-handed affines, all kept),
NRRD and MetaImage through SimpleITK, a folder is one DICOM series.
"""

import logging
import os
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from medi3d.datasets.dicom import last_line, quiet_itk, read_series
from medi3d.datasets.geometry import grid_difference, set_geometry
from medi3d.errors import DataError, ShapeError

log = logging.getLogger(__name__)

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
WRITABLE = (*NIFTI, ".nrrd", ".mha")
"""One file each: a mask with a separate data file could not be renamed into place in one step."""

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}


def suffix_of(path: Path) -> str:
    """The file's ending in lower case, `.nii.gz` in one piece."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def read_volume(path: Path) -> sitk.Image:
    """One 3D image: its stored values (scaled as the header says), in LPS space, on its own grid.

    Args:
        path: A NIfTI, NRRD or MetaImage file, or the folder of one DICOM series.

    Raises:
        DataError: The file is missing, empty, damaged, not 3D, sheared, or holds several channels.
    """
    channels = read_channels(path)
    if len(channels) > 1:
        raise DataError(
            f"{path}: a 4D image with {len(channels)} channels or time points where one 3D image is due; "
            "split it, or set the number of channels if it is multi-channel"
        )
    return channels[0]


def read_channels(path: Path) -> list[sitk.Image]:
    """The 3D images in a file, one for each channel (or time point), all on one grid.

    Raises:
        DataError: As `read_volume`, but several channels are welcome.
    """
    path = Path(path)
    if path.is_dir():
        return [read_series(path)]
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    suffix = suffix_of(path)
    if suffix in NIFTI:
        return _read_nifti(path)
    if suffix in ITK:
        return _read_itk(path)
    hint = (
        "give the folder of the series"
        if suffix in (".dcm", ".ima")
        else "expected " + ", ".join(NIFTI + ITK)
    )
    raise DataError(f"{path}: not a known volume format ({suffix or 'no suffix'}); {hint}")


def _load_nifti(path: Path) -> tuple[nib.Nifti1Image, np.ndarray]:
    """The image and its scaled values (X, Y, Z[, C])."""
    try:
        source = nib.load(path)
        values = np.asanyarray(source.dataobj)  # type: ignore[attr-defined]
    except (
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        MemoryError,
        zlib.error,
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
    ) as error:
        raise DataError(f"{path}: damaged or not a NIfTI file: {last_line(error)}") from error
    if not isinstance(source, nib.Nifti1Image):  # a Nifti2Image is one
        raise DataError(f"{path}: not a NIfTI file but {type(source).__name__}")
    if values.dtype.kind not in "iufb":
        raise DataError(f"{path}: voxels of type {values.dtype}; plain numbers are needed, not colours")
    return source, values


def _read_nifti(path: Path) -> list[sitk.Image]:
    source, values = _load_nifti(path)
    header = source.header
    if not (header["qform_code"] or header["sform_code"]):
        log.warning("%s: neither qform nor sform is set, so left and right are a guess of the reader", path)
    affine = np.asarray(source.affine, dtype=float).copy()
    affine[:3] *= MILLIMETRES[header.get_xyzt_units()[0]]
    return [
        _image(channel, RAS_TO_LPS @ affine[:3, :3], RAS_TO_LPS @ affine[:3, 3], path)
        for channel in _split_channels(values, path)
    ]


def _split_channels(values: np.ndarray, path: Path) -> list[np.ndarray]:
    """(X, Y, Z[, T[, C]]) as a list of (X, Y, Z); axes of length 1 behind the third do not count."""
    if values.ndim < 3 or 0 in values.shape or (values.ndim > 3 and sum(n > 1 for n in values.shape[3:]) > 1):
        raise DataError(f"{path}: an array of shape {values.shape}; a 3D image is due")
    stacked = values.reshape(*values.shape[:3], -1)
    return [stacked[..., channel] for channel in range(stacked.shape[3])]


def _image(values: np.ndarray, steps: np.ndarray, origin: np.ndarray, path: Path) -> sitk.Image:
    """(X, Y, Z) values as an image in SimpleITK's memory order."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T).astype(_itk_type(values.dtype), copy=False))
    set_geometry(image, steps, origin, str(path))
    return image


def _itk_type(dtype: np.dtype) -> np.dtype:
    """The nearest type that ITK has, in the machine's byte order."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind == "f":
        return np.dtype(np.float64 if dtype.itemsize > 4 else np.float32)
    return dtype.newbyteorder("=")


def _read_itk(path: Path) -> list[sitk.Image]:
    try:
        with quiet_itk():
            image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise DataError(f"{path}: damaged or not readable: {last_line(error)}") from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        count = image.GetNumberOfComponentsPerPixel()
        channels = [sitk.VectorIndexSelectionCast(image, index) for index in range(count)]
    elif image.GetDimension() == 4:
        size = [*image.GetSize()[:3], 0]
        channels = [sitk.Extract(image, size, [0, 0, 0, index]) for index in range(image.GetSize()[3])]
    else:
        channels = [image]
    if channels[0].GetDimension() != 3:
        raise DataError(
            f"{path}: a {channels[0].GetDimension()}D image of {image.GetSize()}; a 3D one is due"
        )
    for channel in channels:
        steps = np.reshape(channel.GetDirection(), (3, 3)) * channel.GetSpacing()
        set_geometry(channel, steps, np.array(channel.GetOrigin()), str(path))
    return channels


def write_mask(mask: sitk.Image, like: Path, out: Path) -> None:
    """Write a mask on exactly the grid of the image file that it was made from.

    A NIfTI mask of a NIfTI image takes over its affine, qform, sform and their codes bit by bit.
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
    difference = grid_difference(mask, read_channels(like)[0])
    if difference:
        raise ShapeError(f"the mask is not on the grid of {like}: {difference}")
    mask = smallest_type(mask)
    aside = out.with_name(f".tmp-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if suffix in NIFTI and suffix_of(like) in NIFTI and like.is_file():
            _write_nifti_like(mask, like, aside)
        else:
            sitk.WriteImage(mask, str(aside), useCompression=True)
        os.replace(aside, out)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{out}: cannot be written: {last_line(error)}") from error
    finally:
        aside.unlink(missing_ok=True)


def smallest_type(mask: sitk.Image) -> sitk.Image:
    """The mask as the smallest unsigned type that holds its values."""
    highest = int(sitk.GetArrayViewFromImage(mask).max())
    kind = sitk.sitkUInt8 if highest < 2**8 else sitk.sitkUInt16 if highest < 2**16 else sitk.sitkUInt32
    return sitk.Cast(mask, kind)


def _write_nifti_like(mask: sitk.Image, like: Path, out: Path) -> None:
    source, _ = _load_nifti(like)
    values = sitk.GetArrayFromImage(mask).T
    header = source.header.copy()
    header.extensions.clear()  # may hold the patient's name
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the image's display window
    header.set_intent("none")
    nib.save(type(source)(values, source.affine, header), out)
