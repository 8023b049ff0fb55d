"""NRRD, MetaImage and the other formats that SimpleITK reads, with further checks."""

import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medi3d.datasets.images.dicom import last_line, quiet_itk
from medi3d.datasets.images.formats import suffix_of
from medi3d.datasets.images.geometry import set_geometry
from medi3d.errors import DataError


def read_itk_header(path: Path) -> sitk.ImageFileReader:
    """The header of a file that SimpleITK knows; its voxels are not read.

    Raises:
        DataError: the file is damaged.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with quiet_itk():
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path}: damaged or not readable: {last_line(error)}") from error
    return reader


GEOMETRY = ("offset", "position", "origin", "elementspacing", "elementsize", "transformmatrix", "rotation")


def _check_meta_header(path: Path) -> tuple[Path, int] | None:
    """Raise if a MetaImage's position is not a number: ITK would read it as 0.

    Returns:
        The file with packed voxels, and the byte at which they start. None if they are not packed.
    """
    packed = False
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(4096), b""):
            key, _, value = (part.strip() for part in line.decode("latin-1").partition("="))
            key = key.lower()
            if key in GEOMETRY and not _finite(value):
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
    """Raise if packed voxels are damaged or under `due` bytes: ITK would leave the rest uninitialised."""
    inflator, count = zlib.decompressobj(zlib.MAX_WBITS | 32), 0  # zlib's or gzip's header, as ITK takes both
    try:
        with path.open("rb") as file:
            file.seek(start)
            while not inflator.eof and (chunk := file.read(1 << 20)):
                count += len(inflator.decompress(chunk))
    except (OSError, zlib.error) as error:
        raise DataError(f"{image}: damaged or not readable: packed voxels: {error}") from error
    if count < due:
        raise DataError(f"{image}: damaged: its packed voxels hold {count} bytes; expected {due}")


def read_itk(path: Path) -> list[sitk.Image]:
    """The channels of an image, one image each.

    Raises:
        DataError: the file is damaged, or its position is not a number.
    """
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
            f"{path}: a {channels[0].GetDimension()}D image of {image.GetSize()}; expected a 3D image"
        )
    for channel in channels:
        steps = np.reshape(channel.GetDirection(), (3, 3)) * channel.GetSpacing()
        set_geometry(channel, steps, np.array(channel.GetOrigin()), str(path))
    return channels
