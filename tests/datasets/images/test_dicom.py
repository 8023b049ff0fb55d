"""A DICOM series lies where its slices say; series that are no volume are refused."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medi3d.datasets.images.files import read_volume, write_mask
from medi3d.errors import DataError

EVEN = [0.0, 2.5, 5.0, 7.5]
OBLIQUE = (1, 0, 0, 0, 0.8, 0.6)


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), OBLIQUE])
def test_spacing_and_order_come_from_positions(orientation, write_series):
    image = read_volume(write_series(EVEN[::-1], orientation=orientation))
    assert image.GetSize() == (5, 6, 4)
    assert image.GetSpacing() == pytest.approx((0.5, 0.75, 2.5))  # SliceThickness says 9
    assert sitk.GetArrayFromImage(image)[:, 0, 0].tolist() == [-21, -22, -23, -24]
    assert image.GetOrigin() == pytest.approx((10, -20, 30))
    axes = np.reshape(image.GetDirection(), (3, 3)).T
    np.testing.assert_allclose(
        axes, [*np.reshape(orientation, (2, 3)), np.cross(orientation[:3], orientation[3:])]
    )


def test_a_series_starting_with_an_integer_slope_keeps_fractions(write_series):
    folder = write_series([0.0])
    write_series([2.5], RescaleSlope=0.5, RescaleIntercept=0.25)
    (folder / "1.2.3.4-999.dcm").rename(folder / "second.dcm")
    write_series([0.0])
    assert sitk.GetArrayFromImage(read_volume(folder)).min() == -24
    assert sitk.GetArrayFromImage(read_volume(folder))[1].max() == 500.25


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("missing slice", "slice missing"),
        ("uneven", "uneven slices"),
        ("doubled", "several acquisitions"),
        ("two series", "2 DICOM series.*1.2.3.4 .4 files.*1.9 .3 files"),
        ("one slice", "one slice"),
        ("sheared", "more than any gantry"),
        ("no position", "ImagePositionPatient"),
        ("multi-frame", "multi-frame"),
        ("other pixels", "slices of one volume must agree"),
        ("turned", "parallel"),
        ("broken slice", "cannot be read"),
    ],
)
def test_a_series_that_is_no_volume_is_refused_in_one_line(kind, word, write_series, capfd):
    folder = _bad_series(kind, write_series)
    with pytest.raises(DataError, match=word) as caught:
        read_volume(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert capfd.readouterr().err == ""


def _bad_series(kind: str, write_series) -> Path:
    places = {
        "missing slice": [0.0, 2.5, 7.5, 10.0],
        "uneven": [0.0, 2.5, 5.2, 7.5],
        "doubled": [0.0, 2.5, 2.5],
    }
    places |= {"one slice": [0.0]}
    tags = {"no position": {"ImagePositionPatient": None}, "multi-frame": {"NumberOfFrames": 3}}
    folder = write_series(places.get(kind, EVEN), drift=1.2 if kind == "sheared" else 0, **tags.get(kind, {}))
    if kind == "two series":
        write_series([0.0, 1.0, 2.0], uid="1.9")
    if kind in ("other pixels", "turned"):
        (folder / "1.2.3.4-999.dcm").rename(folder / "last.dcm")
        change = (
            {"PixelSpacing": [0.9, 0.9]}
            if kind == "other pixels"
            else {"orientation": (1, 0, 0, 0, 0.995, 0.0998749)}
        )
        write_series([10.0], **change)
    if kind == "broken slice":
        last = folder / "1.2.3.4-996.dcm"
        last.write_bytes(last.read_bytes()[:150])
    return folder


def test_files_beside_the_slices_do_not_matter(write_series):
    folder = write_series(EVEN)
    (folder / "notes.txt").write_text("hello")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    assert read_volume(folder).GetSize() == (5, 6, 4)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_mask_of_a_series_lies_on_its_grid(suffix, write_series, tmp_path):
    folder = write_series(EVEN, orientation=OBLIQUE)
    image = read_volume(folder)
    write_mask(image > -22, folder, tmp_path / f"mask{suffix}")
    mask = read_volume(tmp_path / f"mask{suffix}")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(image) > -22)
    last = (4, 5, 3)
    np.testing.assert_allclose(
        mask.TransformIndexToPhysicalPoint(last), image.TransformIndexToPhysicalPoint(last), atol=1e-4
    )


REAL = [
    "udacity_TestVolumes/Study3/11-T1post-18670",
    "udacity_TestVolumes/Study3/11_HCropVolume",
    "udacity_TestVolumes/Study1/13_HCropVolume",
    "totalsegmentator_ct/series",
]


@pytest.mark.parametrize("series", REAL)
def test_real_series_agree_with_an_independent_reading(series, shared):
    pydicom = pytest.importorskip("pydicom")
    folder = shared / "dicom" / series
    slices = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(folder.iterdir())]
    places = np.array([[float(v) for v in one.ImagePositionPatient] for one in slices])
    row, column = np.reshape([float(v) for v in slices[0].ImageOrientationPatient], (2, 3))
    order = np.argsort(places @ np.cross(row, column))
    between_rows, between_columns = (float(v) for v in slices[0].PixelSpacing)
    image = read_volume(folder)
    assert image.GetSize() == (slices[0].Columns, slices[0].Rows, len(slices))
    for index in [(0, 0, 0), (3, 7, 0), (3, 7, len(slices) - 1)]:
        expected = (
            places[order[index[2]]] + index[0] * between_columns * row + index[1] * between_rows * column
        )
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(index), expected, atol=1e-3)


def test_values_of_a_real_slice_agree_with_pydicom(shared):
    pydicom = pytest.importorskip("pydicom")
    folder = shared / "dicom" / REAL[0]
    slices = [pydicom.dcmread(path) for path in folder.iterdir()]
    lowest = min(slices, key=lambda one: float(one.ImagePositionPatient[2]))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder))[0], lowest.pixel_array)


def test_a_label_stored_flipped_lies_on_the_series(shared):
    """The label's y axis is flipped against the CT series: in space both are the same voxels."""
    from medi3d.datasets.cohorts.cases import load_case
    from medi3d.datasets.cohorts.cohort import Case
    from medi3d.datasets.images.settings import Normalisation, VolumeSettings

    folder = shared / "dicom" / "totalsegmentator_ct"
    label = folder / "example_seg_dicom.nii.gz"
    highest = int(np.asanyarray(nib.load(label).dataobj).max())
    labels = {str(value): value for value in range(1, highest + 1)}
    window = Normalisation("window", window=[-1000, 1000])
    settings = VolumeSettings("", "CT", labels, normalisation=window)
    sample = load_case(Case("ct", (folder / "series",), label, "ct"), settings)
    body = sample["image"] > -0.5
    assert body[sample["label"] > 0].float().mean() > 0.9
    assert body[sample["label"].flip(2) > 0].float().mean() < 0.9
