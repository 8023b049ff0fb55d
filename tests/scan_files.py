"""Generated scans: any geometry as NIfTI, and DICOM series."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

Writer = Callable[..., Path]


@pytest.fixture
def write_nifti(tmp_path: Path) -> Writer:
    """(X, Y, Z) values and an affine as a NIfTI file."""

    def write(values: np.ndarray, affine: np.ndarray | None = None, name: str = "scan.nii.gz") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(values, np.eye(4) if affine is None else affine, dtype=values.dtype)
        nib.save(image, path)
        return path

    return write


@pytest.fixture
def write_series(tmp_path: Path) -> Writer:
    """A CT series with slices at the given places (mm along the normal), one file each."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    def write(
        places: list[float],
        *,
        folder: str = "series",
        uid: str = "1.2.3.4",
        orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
        drift: float = 0.0,
        pixels: np.ndarray | None = None,
        digits: int = 6,
        **tags: object,
    ) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        normal = np.cross(orientation[:3], orientation[3:])
        for number, place in enumerate(places):
            slice_ = pydicom.Dataset()
            slice_.file_meta = pydicom.dataset.FileMetaDataset()
            slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            slice_.file_meta.MediaStorageSOPClassUID = slice_.SOPClassUID = CTImageStorage
            slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID = generate_uid()
            slice_.SeriesInstanceUID, slice_.StudyInstanceUID, slice_.Modality = uid, "1.2.3", "CT"
            slice_.FrameOfReferenceUID = "1.2.5"
            # The thickness lies on purpose: only positions may be believed.
            slice_.SliceThickness, slice_.InstanceNumber = 9.0, number + 1
            slice_.ImageOrientationPatient = [float(cosine) for cosine in orientation]
            where = np.array([10.0, -20.0, 30.0]) + place * normal + [0, drift * place, 0]
            slice_.ImagePositionPatient = [float(f"{v:.{digits}f}") for v in where]
            slice_.PixelSpacing = [0.75, 0.5]  # between rows, between columns
            slice_.SamplesPerPixel, (slice_.Rows, slice_.Columns) = (
                1,
                pixels.shape[1:] if pixels is not None else (6, 5),
            )
            slice_.PhotometricInterpretation = "MONOCHROME2"
            slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = (
                16,
                16,
                15,
                0,
            )
            slice_.RescaleSlope, slice_.RescaleIntercept = 1, -1024
            values = np.full((6, 5), number + 1000) if pixels is None else pixels[number]
            slice_.PixelData = values.astype(np.uint16).tobytes()
            slice_["PixelData"].VR = "OW"
            for tag, value in tags.items():
                setattr(slice_, tag, value) if value is not None else delattr(slice_, tag)
            # Names in reverse: their order must not decide either.
            slice_.save_as(tmp_path / folder / f"{uid}-{999 - number}.dcm", enforce_file_format=True)
        return tmp_path / folder

    return write
