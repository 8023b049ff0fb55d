"""Volumes read from disk, and masks written back onto the grid of the file that they belong to.

NIfTI goes through nibabel (scaling, qform and sform, oblique and left-handed affines, all kept),
NRRD and MetaImage through SimpleITK, a folder is one DICOM series.
"""

import gzip
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from medi3d.datasets.dicom import last_line, quiet_itk, read_series, read_slices, series_grid
from medi3d.datasets.geometry import grid_difference, set_geometry
from medi3d.errors import DataError, ShapeError
from medi3d.files import written_aside

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
    path = check_format(path)
    if path.is_dir():
        return [read_series(path)]
    return _read_nifti(path) if suffix_of(path) in NIFTI else _read_itk(path)


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
"""What nibabel raises for files that are damaged in one way or another."""


def _open_nifti(path: Path) -> nib.Nifti1Image:
    """The image with its header read and its voxels not."""
    try:
        source = nib.load(path)
    except NIFTI_ERRORS as error:
        raise DataError(f"{path}: damaged or not a NIfTI file: {last_line(error)}") from error
    if not isinstance(source, nib.Nifti1Image):  # a Nifti2Image is one
        raise DataError(f"{path}: not a NIfTI file but {type(source).__name__}")
    _check_nifti_header(source, path)
    return source


def _check_nifti_header(source: nib.Nifti1Image, path: Path) -> None:
    """Refuse what nibabel would mend in silence: the mended header may be another one than was meant."""
    with nib.openers.ImageOpener(str(path)) as file:
        header = type(source.header).from_fileobj(file, check=False)
    begin, least = float(header["vox_offset"]), 544 if isinstance(source, nib.Nifti2Image) else 352
    if header["magic"].tobytes().startswith(b"n+") and not begin >= least:
        raise DataError(
            f"{path}: the voxels begin inside the header (vox_offset {begin:g}, at least {least})"
        )
    sides = header["pixdim"][1:4]
    if not header["sform_code"] and not (np.abs(sides) > 0).all():
        raise DataError(f"{path}: voxels of {sides.tolist()} mm (pixdim); each side must be greater than 0")
    if np.isinf([header["scl_slope"], header["scl_inter"]]).any():
        raise DataError(f"{path}: the scaling is infinite (scl_slope, scl_inter); the header is damaged")


def _nifti_values(source: nib.Nifti1Image, path: Path) -> np.ndarray:
    """Scaled values (X, Y, Z[, C])."""
    try:
        if suffix_of(path) == ".nii.gz":
            with gzip.open(path) as file:
                values = np.asanyarray(type(source).from_stream(file).dataobj)
                while file.read(2**20):  # to the end, where the checksum is
                    pass
        else:
            values = np.asanyarray(source.dataobj)
    except NIFTI_ERRORS as error:
        raise DataError(f"{path}: damaged or not a NIfTI file: {last_line(error)}") from error
    if values.dtype.kind not in "iufb":
        raise DataError(f"{path}: voxels of type {values.dtype}; plain numbers are needed, not colours")
    return values


def _read_nifti(path: Path) -> list[sitk.Image]:
    source = _open_nifti(path)
    steps, origin = _nifti_geometry(source, path)
    return [
        _image(channel, steps, origin, path) for channel in _split_channels(_nifti_values(source, path), path)
    ]


def _nifti_geometry(source: nib.Nifti1Image, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps (3, 3) and origin (3,) in mm, in LPS."""
    header = source.header
    if not (header["qform_code"] or header["sform_code"]):
        log.warning("%s: neither qform nor sform is set, so left and right are a guess of the reader", path)
    affine = np.asarray(source.affine, dtype=float).copy()
    affine[:3] *= _unit(header, path)
    return RAS_TO_LPS @ affine[:3, :3], RAS_TO_LPS @ affine[:3, 3]


def _unit(header: nib.Nifti1Header, path: Path) -> float:
    """Millimetres in the header's unit of length."""
    try:
        return MILLIMETRES[header.get_xyzt_units()[0]]
    except KeyError as error:
        raise DataError(f"{path}: the header's unit of length has no meaning (xyzt_units {error})") from error


def _split_channels(values: np.ndarray, path: Path) -> list[np.ndarray]:
    """(X, Y, Z[, T[, C]]) as a list of (X, Y, Z); axes of length 1 behind the third do not count."""
    if values.ndim < 3 or 0 in values.shape or (values.ndim > 3 and sum(n > 1 for n in values.shape[3:]) > 1):
        raise DataError(f"{path}: an array of shape {values.shape}; a 3D image is due")
    stacked = values.reshape(*values.shape[:3], -1)
    return [stacked[..., channel] for channel in range(stacked.shape[3])]


@dataclass(frozen=True)
class VolumeHeader:
    """What a file says of its size.

    Attributes:
        size: voxels (x, y, z).
        spacing: their sides in mm.
        channels: 3D images in the file.
        value_bytes: of one voxel once it is read.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    channels: int
    value_bytes: int


def read_header(path: Path) -> VolumeHeader:
    """The size of a volume, its voxels not read.

    Raises:
        DataError: As `read_channels`, as far as it shows in the header.
    """
    path = check_format(path)
    if path.is_dir():
        slices = read_slices(path)
        step = float(np.linalg.norm(slices[1].position - slices[0].position))
        return VolumeHeader((*slices[0].size, len(slices)), (*slices[0].spacing, step), 1, 4)
    if suffix_of(path) in NIFTI:
        source = _open_nifti(path)
        steps, _ = _nifti_geometry(source, path)
        stored: Any = source.dataobj
        scaled = stored.slope != 1 or stored.inter != 0
        size = (*source.shape, 1, 1, 1)
        return VolumeHeader(
            size[:3],
            tuple(np.linalg.norm(steps, axis=0)),
            int(np.prod(size[3:])),
            8 if scaled else source.get_data_dtype().itemsize,
        )
    reader = _itk_header(path)
    size = (*reader.GetSize(), 1, 1)
    return VolumeHeader(
        size[:3], (*reader.GetSpacing(), 1.0)[:3], reader.GetNumberOfComponents() * int(np.prod(size[3:])), 8
    )


def read_grid(path: Path) -> sitk.Image:
    """The grid of a volume as an empty image, its voxels not read.

    Raises:
        DataError: As `read_header`.
    """
    path = check_format(path)
    if path.is_dir():
        return series_grid(path)
    if suffix_of(path) in NIFTI:
        source = _open_nifti(path)
        size, (steps, origin) = source.shape[:3], _nifti_geometry(source, path)
    else:
        reader = _itk_header(path)
        size, dimension = reader.GetSize()[:3], reader.GetDimension()
        direction = np.reshape(reader.GetDirection(), (dimension, dimension))[:3, :3]
        steps, origin = direction * reader.GetSpacing()[:3], np.array(reader.GetOrigin()[:3])
    grid = sitk.Image([int(side) for side in size], sitk.sitkUInt8)
    set_geometry(grid, steps, origin, str(path))
    return grid


def _itk_header(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with quiet_itk():
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path}: damaged or not readable: {last_line(error)}") from error
    return reader


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


PLACES = ("offset", "position", "origin", "elementspacing", "elementsize", "transformmatrix", "rotation")


def _check_meta_header(path: Path) -> tuple[Path, int] | None:
    """Refuse a MetaImage whose place is no number: ITK would take 0 for it.

    Returns:
        Where packed voxels are: the file, and the byte that they start at. None where they are not packed.
    """
    packed = False
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(4096), b""):
            key, _, value = (part.strip() for part in line.decode("latin-1").partition("="))
            key = key.lower()
            if key in PLACES and not _finite(value):
                raise DataError(f"{path}: {key} is {value!r}; finite numbers are needed")
            if key == "compresseddata":
                packed = value[:1].lower() in ("t", "y", "1")
            if key == "elementdatafile":
                here = (path, file.tell()) if value.lower() == "local" else (path.parent / value, 0)
                return here if packed else None
    return None


def _finite(text: str) -> bool:
    try:
        return bool(np.isfinite([float(part) for part in text.split()]).all())
    except ValueError:
        return False


def _check_unpacks(path: Path, start: int, due: int, image: Path) -> None:
    """Refuse packed voxels, damaged or fewer than `due` bytes: ITK leaves the rest as the memory was."""
    inflator, count = zlib.decompressobj(zlib.MAX_WBITS | 32), 0  # zlib's or gzip's header, as ITK takes both
    try:
        with path.open("rb") as file:
            file.seek(start)
            while not inflator.eof and (chunk := file.read(1 << 20)):
                count += len(inflator.decompress(chunk))
    except (OSError, zlib.error) as error:
        raise DataError(f"{image}: damaged or not readable: packed voxels: {error}") from error
    if count < due:
        raise DataError(f"{image}: damaged: its packed voxels hold {count} bytes; {due} are due")


def _read_itk(path: Path) -> list[sitk.Image]:
    packed = _check_meta_header(path) if suffix_of(path) in (".mha", ".mhd") else None
    try:
        with quiet_itk():
            image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise DataError(f"{path}: damaged or not readable: {last_line(error)}") from error
    if packed:
        values = image.GetNumberOfPixels() * image.GetNumberOfComponentsPerPixel()
        _check_unpacks(*packed, values * image.GetSizeOfPixelComponent(), path)
    if image.GetNumberOfComponentsPerPixel() > 1:
        count = image.GetNumberOfComponentsPerPixel()
        channels = [sitk.VectorIndexSelectionCast(image, index) for index in range(count)]
    elif image.GetDimension() == 4:
        size = [*image.GetSize()[:3], 0]
        channels = [sitk.Extract(image, size, [0, 0, 0, index]) for index in range(image.GetSize()[3])]
    else:
        channels = [image]
    if 0 in channels[0].GetSize():
        raise DataError(f"{path}: an image of {channels[0].GetSize()} voxels; each side needs one or more")
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
    difference = grid_difference(mask, read_grid(like))
    if difference:
        raise ShapeError(f"the mask is not on the grid of {like}: {difference}")
    mask = smallest_type(mask)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(out) as aside:
            if suffix in NIFTI and suffix_of(like) in NIFTI and like.is_file():
                _write_nifti_like(mask, like, aside)
            else:
                sitk.WriteImage(mask, str(aside), useCompression=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{out}: cannot be written: {last_line(error)}") from error


def smallest_type(mask: sitk.Image) -> sitk.Image:
    """The mask as the smallest unsigned type that holds its values."""
    highest = int(sitk.GetArrayViewFromImage(mask).max())
    kind = sitk.sitkUInt8 if highest < 2**8 else sitk.sitkUInt16 if highest < 2**16 else sitk.sitkUInt32
    return sitk.Cast(mask, kind)


def _write_nifti_like(mask: sitk.Image, like: Path, out: Path) -> None:
    source = _open_nifti(like)
    values = sitk.GetArrayFromImage(mask).T
    header = source.header.copy()
    header.extensions.clear()  # may hold the patient's name
    header.set_data_dtype(values.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the image's display window
    header.set_intent("none")
    nib.save(type(source)(values, source.affine, header), out)
