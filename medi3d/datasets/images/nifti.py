"""Read NIfTI, its pairs, Analyze and FreeSurfer's MGH with nibabel as SimpleITK images; write NIfTI masks."""

import gzip
import logging
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from medi3d.datasets.images.dicom import last_line
from medi3d.datasets.images.formats import suffix_of
from medi3d.datasets.images.geometry import set_geometry
from medi3d.errors import DataError

log = logging.getLogger(__name__)
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}

FREE_TEXT = ("descrip", "db_name", "aux_file", "intent_name", "data_type")
"""Fields of a header, of NIfTI 1 or 2, for words."""

NIFTI_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    MemoryError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)
"""Exceptions that nibabel raises for damaged files."""


def open_nifti(path: Path) -> Any:
    """The image, its header read but not its voxels: NIfTI (1 or 2, one file or two), Analyze or MGH.

    Raises:
        DataError: the file is damaged or of another kind, or its header contradicts itself.
    """
    try:
        source = nib.load(path)
    except NIFTI_ERRORS as error:
        raise DataError(f"{path}: damaged or not a NIfTI file: {last_line(error)}") from error
    if isinstance(source, nib.Nifti1Pair):  # all of NIfTI's classes are
        _check_nifti_header(source, path)
    elif not isinstance(source, nib.AnalyzeImage | nib.MGHImage):
        raise DataError(f"{path}: not a NIfTI file but {type(source).__name__}")
    return source


def _check_nifti_header(source: nib.Nifti1Pair, path: Path) -> None:
    """Raise for what nibabel would repair silently: the repaired header may not be the intended one."""
    place = source.file_map.get("header", source.file_map["image"]).filename
    with nib.openers.ImageOpener(place or str(path)) as file:
        header = type(source.header).from_fileobj(file, check=False)
    begin, least = float(header["vox_offset"]), 544 if isinstance(source, nib.Nifti2Pair) else 352
    if header["magic"].tobytes().startswith(b"n+") and not begin >= least:
        raise DataError(
            f"{path}: the voxels begin inside the header (vox_offset {begin:g}, at least {least})"
        )
    sides = header["pixdim"][1:4]
    if not header["sform_code"] and not (np.abs(sides) > 0).all():
        raise DataError(f"{path}: voxels of {sides.tolist()} mm (pixdim); each side must be greater than 0")
    if np.isinf([header["scl_slope"], header["scl_inter"]]).any():
        raise DataError(f"{path}: the scaling is infinite (scl_slope, scl_inter); the header is damaged")


def _nifti_values(source: Any, path: Path) -> np.ndarray:
    """Scaled values (X, Y, Z[, C])."""
    try:
        if suffix_of(path) == ".nii.gz":
            with gzip.open(path) as file:
                values = np.asanyarray(type(source).from_stream(file).dataobj)
                while file.read(2**20):  # to the end, where the checksum is
                    pass
        else:
            values = np.asanyarray(source.dataobj)
            if suffix_of(path) in (".mgz", ".img.gz"):
                with gzip.open(path) as file:
                    while file.read(2**20):
                        pass
    except NIFTI_ERRORS as error:
        raise DataError(f"{path}: damaged or not a NIfTI file: {last_line(error)}") from error
    if values.dtype.kind not in "iufb":
        raise DataError(f"{path}: voxels of type {values.dtype}; expected plain numbers, not colours")
    return values


def read_nifti(path: Path) -> list[sitk.Image]:
    """The channels of a NIfTI image, each as an image of its own, in LPS millimetres.

    Raises:
        DataError: the file is damaged, or its header contradicts itself.
    """
    source = open_nifti(path)
    steps, origin = nifti_geometry(source, path)
    return [
        _image(channel, steps, origin, path) for channel in _split_channels(_nifti_values(source, path), path)
    ]


def nifti_geometry(source: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps (3, 3) and origin (3,) in mm, in LPS."""
    header = source.header
    affine = np.asarray(source.affine, dtype=float).copy()
    if isinstance(source, nib.Nifti1Pair):
        if not (header["qform_code"] or header["sform_code"]):
            log.warning(
                "%s: neither qform nor sform is set, so left and right are a guess of the reader", path
            )
        affine[:3] *= _unit(header, path)
    elif isinstance(source, nib.AnalyzeImage):
        log.warning("%s: Analyze has no orientation, so left and right are a guess of the reader", path)
    return RAS_TO_LPS @ affine[:3, :3], RAS_TO_LPS @ affine[:3, 3]


def _unit(header: nib.Nifti1Header, path: Path) -> float:
    """Millimetres in the header's unit of length."""
    try:
        return MILLIMETRES[header.get_xyzt_units()[0]]
    except KeyError as error:
        raise DataError(f"{path}: the header's unit of length has no meaning (xyzt_units {error})") from error


def _split_channels(values: np.ndarray, path: Path) -> list[np.ndarray]:
    """(X, Y, Z[, T[, C]]) as a list of (X, Y, Z); axes of length 1 after the third are ignored."""
    if values.ndim < 3 or 0 in values.shape or (values.ndim > 3 and sum(n > 1 for n in values.shape[3:]) > 1):
        raise DataError(f"{path}: an array of shape {values.shape}; expected a 3D image")
    stacked = values.reshape(*values.shape[:3], -1)
    return [stacked[..., channel] for channel in range(stacked.shape[3])]


def _image(values: np.ndarray, steps: np.ndarray, origin: np.ndarray, path: Path) -> sitk.Image:
    """(X, Y, Z) values as an image in SimpleITK's memory order."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T).astype(_itk_type(values.dtype), copy=False))
    set_geometry(image, steps, origin, str(path))
    return image


def _itk_type(dtype: np.dtype) -> np.dtype:
    """The nearest type that ITK supports, in the machine's byte order."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind == "f":
        return np.dtype(np.float64 if dtype.itemsize > 4 else np.float32)
    return dtype.newbyteorder("=")


def write_nifti_like(mask: sitk.Image, like: Path, out: Path) -> None:
    """Write a mask with the header of the NIfTI file whose grid it lies on."""
    source = open_nifti(like)
    values = sitk.GetArrayFromImage(mask).T
    header = source.header.copy()
    header.extensions.clear()  # may hold the patient's name
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the image's display window
    header.set_intent("none")
    for name in set(FREE_TEXT) & set(header.keys()):  # may hold the patient's name
        header[name] = b""
    nib.save(type(source)(values, source.affine, header), out)


def write_nifti(mask: sitk.Image, out: Path) -> None:
    """Write an image with its affine as sform only: unlike a qform, it may be sheared."""
    affine = np.eye(4)
    affine[:3, :3] = RAS_TO_LPS @ np.reshape(mask.GetDirection(), (3, 3)) @ np.diag(mask.GetSpacing())
    affine[:3, 3] = RAS_TO_LPS @ mask.GetOrigin()
    image = nib.Nifti1Image(sitk.GetArrayFromImage(mask).T, affine)
    image.set_qform(None, code=0)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    nib.save(image, out)
