"""A corpus of malformed scans: each ends in a right mask, or in one line that names the file.

The network is a threshold, so that the right mask is known.
"""

import gzip
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medi3d.datasets.images.settings import VolumeSettings
from medi3d.engine.inference import SlidingWindow
from medi3d.engine.precision import Precision
from medi3d.prediction.predict import predict_files
from medi3d.prediction.predictor import Predictor

SHAPE = (7, 6, 5)
VALUES = np.random.default_rng(0).normal(100, 30, SHAPE).astype(np.float32)
AFFINE = np.array([[0.0, 2, 0, 3], [-1.5, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])


class Threshold(torch.nn.Module):
    def forward(self, x):
        return torch.cat([-x, x], dim=1)


def predict(path: Path, out: Path, spacing=None):
    """The mask's path, or the line that tells what is wrong."""
    settings = VolumeSettings(root="", modality="MR", labels={"bright": 1}, spacing=spacing)
    precision = Precision(torch.device("cpu"), bf16=False)
    predictor = Predictor(settings, Threshold(), SlidingWindow((16, 16, 16)), precision)
    written, failed = predict_files([predictor], [path], out)
    assert len(written) + len(failed) == 1
    return (written or failed)[0]


def bright(values):
    low, high = np.percentile(values, [0.5, 99.5])
    return np.clip((values.astype(np.float32) - low) * (2 / (high - low)) - 1, -1, 1) > 0


def refused(path: Path, tmp_path: Path, word: str, spacing=None) -> None:
    line = predict(path, tmp_path / "masks", spacing)
    assert isinstance(line, str), f"{path.name} was taken: {line}"
    assert path.name in line
    assert "\n" not in line
    assert word in line
    assert not list((tmp_path / "masks").glob("*")), "a mask of a refused scan"


def nifti(tmp_path: Path, values=VALUES, **fields) -> Path:
    """A NIfTI file whose header bytes are overwritten: name of a field -> numbers."""
    offsets = {"dim": (40, "h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "f")}
    offsets |= {"vox_offset": (108, "f"), "slope": (112, "f"), "units": (123, "B"), "codes": (252, "h")}
    offsets |= {"quaternion": (256, "f"), "srow": (280, "f"), "magic": (344, "B"), "size": (0, "i")}
    image = nib.Nifti1Image(values, AFFINE)
    image.set_qform(AFFINE, 1)
    nib.save(image, tmp_path / "scan.nii")
    data = bytearray((tmp_path / "scan.nii").read_bytes())
    for name, numbers in fields.items():
        start, kind = offsets[name]
        packed = struct.pack(f"<{len(numbers)}{kind}", *numbers)
        data[start : start + len(packed)] = packed
    (tmp_path / "scan.nii").write_bytes(data)
    return tmp_path / "scan.nii"


NAN, INF = float("nan"), float("inf")
SHEARED = (1, 0.3, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)

BAD_HEADERS = {
    "no dimensions": ({"dim": [0]}, "shape (0,)"),
    "nine dimensions": ({"dim": [9]}, "damaged"),
    "axis of length 0": ({"dim": [3, 0, 6, 5]}, "(0, 6, 5)"),
    "negative axis": ({"dim": [3, -7, 6, 5]}, "damaged"),
    "axes beyond memory": ({"dim": [3, 32767, 32767, 32767]}, "damaged"),
    "one slice more than data": ({"dim": [3, 7, 6, 6]}, "damaged"),
    "unknown datatype": ({"datatype": [9999]}, "9999"),
    "wider datatype than data": ({"datatype": [64], "bitpix": [64]}, "damaged"),
    "data behind the end": ({"vox_offset": [99999.0]}, "damaged"),
    "data inside the header": ({"vox_offset": [16.0]}, "16"),
    "wrong magic": ({"magic": b"xyz\0"}, "file type"),
    "voxels at the offset 0": ({"vox_offset": [0.0]}, "vox_offset"),
    "NaN in sform": ({"srow": [NAN]}, "NaN"),
    "infinite sform": ({"srow": [INF]}, "infinite"),
    "singular sform": ({"srow": [0, 0, 0, 0]}, "greater than 0"),
    "parallel axes": ({"srow": [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]}, "sheared"),
    "sheared": ({"srow": SHEARED}, "sheared"),
    "spacing 0, no forms": ({"codes": [0, 0], "pixdim": [1, 0, 1, 1]}, "pixdim"),
    "NaN spacing, qform only": ({"codes": [1, 0], "pixdim": [1, NAN, 1, 1]}, "pixdim"),
    "no unit quaternion": ({"codes": [1, 0], "quaternion": [2, 2, 2]}, "damaged"),
    "NaN quaternion": ({"codes": [1, 0], "quaternion": [NAN, 0, 0]}, "affine"),
    "unit without meaning": ({"units": [7]}, "xyzt_units"),
    "infinite slope": ({"slope": [INF, 0]}, "scl_slope"),
    "spacing of 1e-12 mm": ({"srow": np.diag([1e-12] * 3 + [1])[:3].ravel()}, "greater than 0"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nifti_headers_that_are_refused(name, tmp_path):
    fields, word = BAD_HEADERS[name]
    refused(nifti(tmp_path, **fields), tmp_path, word)


GOOD_HEADERS = {
    "as it should be": {},
    "wrong bitpix": {"bitpix": [8]},
    "wrong header size": {"size": [17]},
    "NaN slope": {"slope": [NAN, NAN]},
    "slope 0": {"slope": [0, 7]},
    "forms that disagree": {"quaternion": [0, 0, 0], "codes": [1, 2]},
    "pixdim that disagrees": {"pixdim": [1, 9, 9, 9]},
    "no form at all": {"codes": [0, 0]},
    "length 1 behind the third axis": {"dim": [5, 7, 6, 5, 1, 1]},
    "left-handed": {"srow": [-1.5, 0, 0, 3, 0, 2, 0, 4, 0, 0, 3, 5]},
    "spacing of 1e5 mm": {"srow": [1e5, 0, 0, 3, 0, 1e5, 0, 4, 0, 0, 1e5, 5]},
    "units in micrometres": {"units": [3]},
}


@pytest.mark.parametrize("name", GOOD_HEADERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nifti_headers_that_are_odd_and_right(name, tmp_path):
    path = nifti(tmp_path, **GOOD_HEADERS[name])
    mask, scan = nib.load(predict(path, tmp_path / "masks")), nib.load(path)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), bright(VALUES))
    np.testing.assert_array_equal(mask.affine, scan.affine)


def changed(change):
    values = VALUES.copy()
    change(values)
    return values


BAD_VALUES = {
    "NaN": (changed(lambda v: v.__setitem__((0, 0, 0), NAN)), "1 voxels are NaN"),
    "infinite": (changed(lambda v: v.__setitem__((0, 0, 0), INF)), "1 voxels are NaN or infinite"),
    "all NaN": (VALUES * NAN, "NaN"),
    "constant": (VALUES * 0 + 3, "every voxel is 3"),
    "one voxel": (VALUES[:1, :1, :1], "every voxel"),
    "2D": (VALUES[..., 0], "expected a 3D image"),
    "4D": (np.stack([VALUES] * 2, -1), "4D image"),
    "5D": (np.ones((2, 2, 2, 2, 2), np.float32), "expected a 3D image"),
    "complex": (VALUES.astype(np.complex64), "plain numbers"),
    "colours": (np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours"),
    "overflowing float32": (VALUES.astype(np.float64) * 1e300, ""),
}


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_that_are_refused(name, tmp_path):
    values, word = BAD_VALUES[name]
    refused(nifti(tmp_path, values), tmp_path, word)


GOOD_VALUES = {
    "one slice": VALUES[..., :1],
    "big-endian": VALUES.astype(">f4"),
    "64-bit integers": (VALUES * 1e9).astype(np.int64),
    "unsigned 64-bit": (np.abs(VALUES) * 1e9).astype(np.uint64),
    "tiny numbers": VALUES * 1e-30,
    "huge numbers": VALUES * 1e30,
    "one bright voxel": changed(lambda v: (v.fill(0), v.__setitem__((3, 3, 3), 9))),
}


@pytest.mark.parametrize("name", GOOD_VALUES)
def test_values_that_are_odd_and_right(name, tmp_path):
    image = nib.Nifti1Image(GOOD_VALUES[name], AFFINE, dtype=GOOD_VALUES[name].dtype)
    nib.save(image, tmp_path / "scan.nii.gz")
    mask = np.asarray(nib.load(predict(tmp_path / "scan.nii.gz", tmp_path / "masks")).dataobj)
    values = GOOD_VALUES[name].astype(np.float64)
    expected = values > 0 if name == "one bright voxel" else bright(values)
    assert (mask != expected).mean() < 0.01  # ties at the threshold may be rounded either way


def bytes_of(kind: str, tmp_path: Path) -> tuple[str, bytes]:
    data = nifti(tmp_path).read_bytes()
    packed = gzip.compress(data, mtime=0)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 255
    return {
        "empty": ("x.nii.gz", b""),
        "half a header": ("x.nii", data[:100]),
        "half the data": ("x.nii", data[:700]),
        "gz cut": ("x.nii.gz", packed[: len(packed) // 2]),
        "gz without its end": ("x.nii.gz", packed[:-6]),
        "gz with a flipped byte": ("x.nii.gz", bytes(flipped)),
        "text in gz": ("x.nii.gz", gzip.compress(b"no image" * 99)),
        "not packed": ("x.nii.gz", data),
        "packed without saying so": ("x.nii", packed),
        "NRRD called NIfTI": ("x.nii", b"NRRD0004\ntype: float\n"),
        "another format": ("x.png", b"\x89PNG"),
        "no suffix": ("x", data),
        "a single slice": ("x.dcm", b"\0" * 128 + b"DICM"),
        "zeros": ("x.nii", bytes(2000)),
    }[kind]


KINDS = ["empty", "half a header", "half the data", "gz cut", "gz without its end", "gz with a flipped byte"]
KINDS += ["text in gz", "not packed", "packed without saying so", "NRRD called NIfTI", "another format"]
KINDS += ["no suffix", "a single slice", "zeros"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused(kind, tmp_path):
    name, data = bytes_of(kind, tmp_path)
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, tmp_path, "")


def nrrd(tmp_path: Path, data: bytes | None = None, **fields: str | None) -> Path:
    lines = {"type": "float", "dimension": "3", "space": "left-posterior-superior", "sizes": "7 6 5"}
    lines |= {"space directions": "(1.5,0,0) (0,2,0) (0,0,3)", "endian": "little", "encoding": "raw"}
    lines |= {"space origin": "(3,4,5)"} | {key.replace("_", " "): value for key, value in fields.items()}
    header = "NRRD0004\n" + "".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None)
    path = tmp_path / ("scan.nhdr" if "data_file" in fields else "scan.nrrd")
    path.write_bytes(header.encode() + b"\n" + (VALUES.T.tobytes() if data is None else data))
    return path


BAD_NRRDS = {
    "cut": {"data": VALUES.tobytes()[:-9]},
    "no sizes": {"sizes": None},
    "size 0": {"sizes": "0 6 5"},
    "sizes beyond memory": {"sizes": "2000000 2000000 2000000"},
    "sizes beyond integers": {"sizes": "99999999999999999999 6 5"},
    "two sizes of three": {"sizes": "7 6"},
    "unknown type": {"type": "quaternion"},
    "unknown encoding": {"encoding": "zip"},
    "sheared": {"space_directions": "(1,0,0) (0.4,1,0) (0,0,1)"},
    "direction of length 0": {"space_directions": "(0,0,0) (0,2,0) (0,0,3)"},
    "parallel directions": {"space_directions": "(1,0,0) (1,0,0) (0,0,1)"},
    "NaN direction": {"space_directions": "(nan,0,0) (0,2,0) (0,0,3)"},
    "NaN origin": {"space_origin": "(nan,4,5)"},
    "data file missing": {"data_file": "nowhere.raw"},
    "2D": {"dimension": "2", "sizes": "7 30", "space_directions": None, "space_origin": None, "space": None},
}


@pytest.mark.parametrize("name", BAD_NRRDS)
def test_nrrds_that_are_refused(name, tmp_path):
    refused(nrrd(tmp_path, **BAD_NRRDS[name]), tmp_path, "")


def mha(tmp_path: Path, data: bytes | None = None, **fields: str | None) -> Path:
    lines = {"ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False"}
    lines |= {"TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "3 4 5", "ElementSpacing": "1.5 2 3"}
    lines |= {"DimSize": "7 6 5", "ElementType": "MET_FLOAT", **fields}
    lines["ElementDataFile"] = fields.get("ElementDataFile") or "LOCAL"
    header = "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None)
    path = tmp_path / ("scan.mhd" if "ElementDataFile" in fields else "scan.mha")
    path.write_bytes(header.encode() + (VALUES.T.tobytes() if data is None else data))
    return path


BAD_MHAS = {
    "cut": {"data": VALUES.tobytes()[:-9]},
    "no size": {"DimSize": None},
    "size 0": {"DimSize": "0 6 5"},
    "negative size": {"DimSize": "-7 6 5"},
    "sizes beyond memory": {"DimSize": "2000000 2000000 2000000"},
    "unknown type": {"ElementType": "MET_QUATERNION"},
    "spacing 0": {"ElementSpacing": "0 2 3"},
    "NaN spacing": {"ElementSpacing": "nan 2 3"},
    "sheared": {"TransformMatrix": "1 0 0 0.4 0.9 0 0 0 1"},
    "singular matrix": {"TransformMatrix": "0 0 0 0 1 0 0 0 1"},
    "NaN offset": {"Offset": "nan 4 5"},
    "data file missing": {"ElementDataFile": "nowhere.raw"},
    "two channels": {"ElementNumberOfChannels": "2", "DimSize": "7 3 5"},
    "text": {"NDims": "three"},
}


@pytest.mark.parametrize("name", BAD_MHAS)
def test_mhas_that_are_refused(name, tmp_path):
    refused(mha(tmp_path, **BAD_MHAS[name]), tmp_path, "")


PACKED = zlib.compress(VALUES.T.tobytes())
BAD_PACKING = {
    "not packed": VALUES.T.tobytes(),
    "cut": PACKED[:-40],
    "a bit turned": PACKED[:200] + bytes([PACKED[200] ^ 16]) + PACKED[201:],
    "too few voxels": zlib.compress(VALUES.T.tobytes()[:-4]),
    "nothing": b"",
}


@pytest.mark.parametrize("name", BAD_PACKING)
@pytest.mark.parametrize("apart", [False, True], ids=["local", "own file"])
def test_packed_mhas_that_are_refused(name, apart, tmp_path):
    """ITK reads each as if it were whole, the voxels as the memory happens to be."""
    if apart:
        (tmp_path / "scan.zraw").write_bytes(BAD_PACKING[name])
    place = {"data": b"", "ElementDataFile": "scan.zraw"} if apart else {"data": BAD_PACKING[name]}
    refused(mha(tmp_path, CompressedData="True", **place), tmp_path, "")


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress], ids=["zlib", "gzip"])
def test_packed_mhas_that_are_right(pack, tmp_path):
    packed = pack(VALUES.T.tobytes())
    path = mha(tmp_path, packed, CompressedData="True", CompressedDataSize=str(len(packed)))
    mask = sitk.ReadImage(str(predict(path, tmp_path / "masks")))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask).T, bright(VALUES))


@pytest.mark.parametrize(
    "make",
    [
        nrrd,
        mha,
        lambda p: nrrd(p, space_directions="(-1.5,0,0) (0,2,0) (0,0,3)"),
        lambda p: nrrd(p, space_directions="(0,1.5,0) (0,0,2) (3,0,0)"),
        lambda p: nrrd(p, space="right-anterior-superior"),
        lambda p: mha(p, TransformMatrix="-1 0 0 0 1 0 0 0 1"),
        lambda p: mha(p, ElementSpacing="-1.5 2 3"),
    ],
    ids=[
        "nrrd",
        "mha",
        "nrrd flipped",
        "nrrd permuted",
        "nrrd in RAS",
        "mha left-handed",
        "negative spacing",
    ],
)
def test_itk_files_that_are_odd_and_right(make, tmp_path):
    path = make(tmp_path)
    answer = predict(path, tmp_path / "masks")
    if isinstance(answer, str):
        assert path.name in answer
        return
    mask, scan = sitk.ReadImage(str(answer)), sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask).T, bright(VALUES))
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, name)(), getattr(scan, name)(), atol=1e-6)


EVEN = [0.0, 3.0, 6.0, 9.0]
BAD_SERIES = {
    "slice missing": ([0.0, 3.0, 9.0, 12.0], {}, "uneven"),
    "two slices missing": ([0.0, 3.0, 12.0, 15.0], {}, "uneven"),
    "one place twice": ([0.0, 3.0, 3.0, 6.0], {}, "no distance"),
    "all in one place": ([5.0] * 4, {}, "no distance"),
    "one slice": ([0.0], {}, "one slice"),
    "sheared too far": (EVEN, {"drift": 1.3}, "sheared"),
    "no position": (EVEN, {"ImagePositionPatient": None}, "ImagePositionPatient"),
    "no orientation": (EVEN, {"ImageOrientationPatient": None}, "ImageOrientationPatient"),
    "orientation of zeros": (EVEN, {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, ""),
    "parallel orientation": (EVEN, {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, ""),
    "no unit vectors": (EVEN, {"ImageOrientationPatient": [2, 0, 0, 0, 2, 0]}, ""),
    "spacing 0": (EVEN, {"PixelSpacing": [0, 0]}, ""),
    "no spacing": (EVEN, {"PixelSpacing": None}, "PixelSpacing"),
    "fewer pixels than said": (EVEN, {"Rows": 60}, ""),
    "no pixels": (EVEN, {"PixelData": None}, ""),
    "colours": (EVEN, {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, ""),
    "many frames": (EVEN, {"NumberOfFrames": 4}, "multi-frame"),
    "zero rows": (EVEN, {"Rows": 0}, ""),
}


@pytest.mark.parametrize("name", BAD_SERIES)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_dicom_series_that_are_refused(name, write_series, tmp_path):
    places, tags, word = BAD_SERIES[name]
    refused(write_series(places, **tags), tmp_path, word)


def test_a_folder_of_two_series_is_refused_with_a_list(write_series, tmp_path):
    write_series(EVEN, uid="1.2.3.4")
    folder = write_series(EVEN, uid="1.2.3.5")
    refused(folder, tmp_path, "1.2.3.4")
    assert "1.2.3.5" in predict(folder, tmp_path / "masks")


def rewritten(folder: Path, change) -> Path:
    """The series with its second file changed as bytes."""
    path = sorted(folder.iterdir())[1]
    path.write_bytes(change(path.read_bytes()))
    return folder


BAD_BYTES = {
    "cut file": lambda data: data[: len(data) // 2],
    "cut pixels": lambda data: data[:-20],
    "empty file": lambda data: b"",
    "says JPEG 2000, is raw": lambda data: data.replace(
        b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4.90"[:20]
    ),
    "unknown transfer syntax": lambda data: data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.99999.1.2.1\0"),
    "garbage": lambda data: bytes(range(256)) * 9,
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_a_series_with_a_damaged_file_is_refused(name, write_series, tmp_path):
    folder = rewritten(write_series(EVEN), BAD_BYTES[name])
    line = predict(folder, tmp_path / "masks")
    assert isinstance(line, str)
    assert folder.name in line
    assert "\n" not in line


WIDE = [100, 0, 0, 3, 0, 100, 0, 4, 0, 0, 100, 5]


def test_a_grid_that_no_memory_holds_is_refused(tmp_path):
    refused(nifti(tmp_path, srow=WIDE), tmp_path, "700000 x 600000 x 500000 voxels", [1e-3] * 3)


def test_a_grid_of_one_voxel_has_no_contrast_to_normalise(tmp_path):
    refused(nifti(tmp_path, srow=WIDE), tmp_path, "gives NaN", [1e6] * 3)
