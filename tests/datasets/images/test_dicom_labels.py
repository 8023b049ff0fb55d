"""Labels from DICOM lie on the voxels that they were drawn on, and have the values of their names."""

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import uid

from medi3d.datasets.cohorts.cases import load_case
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.dicom_labels import read_dicom_labels
from medi3d.datasets.images.dicom_seg import write_seg
from medi3d.datasets.images.files import read_volume
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom", "ignore::UserWarning:highdicom")

OBLIQUE = (0.8, 0.6, 0.0, -0.6, 0.8, 0.0)
SHAPE = (5, 24, 30)
LABELS = {"organ": 3, "lesion": 7}
rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]


@pytest.fixture
def series(write_series):
    noise = np.random.default_rng(0).integers(900, 1100, SHAPE)
    return write_series([3.0 * k for k in range(SHAPE[0])], orientation=OBLIQUE, pixels=noise)


def truth():
    """Two labels, the outer slices empty."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:4, 4:15, 3:20] = 3
    mask[2, 6:9, 5:9] = 7
    return mask


def on_grid_of(array, image):
    mask = sitk.GetImageFromArray(array)
    mask.CopyInformation(image)
    return mask


def array_of(path, image, labels=LABELS, **options):
    return sitk.GetArrayFromImage(read_dicom_labels(path, labels, image, **options))


@pytest.fixture
def seg(series, tmp_path):
    pytest.importorskip("highdicom")
    image = read_volume(series)
    write_seg(on_grid_of(truth(), image), LABELS, series, tmp_path / "seg.dcm", version="1")
    return tmp_path / "seg.dcm", image


def test_a_seg_has_the_values_of_its_names_whatever_their_numbers(seg):
    path, image = seg
    assert np.array_equal(array_of(path, image), truth())
    swapped = array_of(path, image, {"Lesion ": 1, "organ": 2})
    assert np.array_equal(swapped, np.array([0, 0, 0, 2, 0, 0, 0, 1])[truth()])


def test_a_seg_of_other_names_goes_by_numbers(seg):
    path, image = seg
    assert np.array_equal(array_of(path, image, {"a": 1, "b": 2}) == 2, truth() == 7)
    with pytest.raises(DataError, match=r"no segment named a, b \(there are organ, lesion\)"):
        array_of(path, image, {"a": 1, "b": 5})


def test_a_label_may_lack_only_where_that_is_allowed(seg):
    path, image = seg
    labels = {"organ": 1, "other": 2}
    with pytest.raises(DataError, match=r"no segment named other .*data.empty_labels"):
        array_of(path, image, labels)
    assert np.array_equal(array_of(path, image, labels, may_lack=True) == 1, truth() == 3)


@pytest.mark.parametrize("code", ["RAS", "PIR", "SLA"])
def test_a_seg_lies_on_an_image_with_its_axes_turned(code, seg):
    path, image = seg
    turned = sitk.DICOMOrient(image, code)
    expected = sitk.DICOMOrient(on_grid_of(truth(), image), code)
    assert np.array_equal(array_of(path, turned), sitk.GetArrayFromImage(expected))


@pytest.mark.parametrize(
    ("move", "word"),
    [((0, 0, 1.4), "between two slices"), ((0, 0, 12), "outside of the image"), ((40, 0, 0), "outside")],
)
def test_a_seg_that_lies_elsewhere_is_refused(move, word, seg):
    path, image = seg
    image.SetOrigin(np.add(image.GetOrigin(), move).tolist())
    with pytest.raises(DataError, match=word):
        array_of(path, image)


def test_a_seg_of_other_voxels_is_refused(seg):
    path, image = seg
    image.SetSpacing((1.0, 1.0, 3.0))
    with pytest.raises(DataError, match="not those of the image"):
        array_of(path, image)


@pytest.mark.parametrize("kind", ["FRACTIONAL", "LABELMAP"])
def test_other_kinds_of_seg(kind, series, tmp_path):
    hd = pytest.importorskip("highdicom")
    from pydicom.sr.codedict import codes

    image = read_volume(series)
    paths = sorted(series.iterdir(), reverse=True)
    sources = [pydicom.dcmread(path) for path in paths]
    for source in sources:
        for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"):
            setattr(source, name, "")
        source.StudyID = source.StudyDate = source.StudyTime = source.ReferringPhysicianName = ""
    algorithm = hd.AlgorithmIdentificationSequence("x", version="1", family=codes.DCM.ArtificialIntelligence)
    what = (codes.SCT.AnatomicalStructure, codes.SCT.Organ, "AUTOMATIC", algorithm)
    segments = [hd.seg.SegmentDescription(n, name, *what) for n, name in enumerate(LABELS, 1)]
    numbered = np.select([truth() == 3, truth() == 7], [1, 2]).astype(np.uint8)
    pixels = np.stack([numbered == n for n in (1, 2)], -1) * 0.7 + 0.2 if kind == "FRACTIONAL" else numbered
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        identity = (uid.generate_uid(), 9, uid.generate_uid(), 1, "m", "m", "1", "0")
        hd.seg.Segmentation(sources, pixels, kind, segments, *identity).save_as(tmp_path / "seg.dcm")
    assert np.array_equal(array_of(tmp_path / "seg.dcm", image), truth())


def test_a_case_of_a_series_and_a_seg(seg, series):
    path, _ = seg
    settings = VolumeSettings("", "MR", LABELS)
    label = load_case(Case("a", (series,), path, "a"), settings)["label"][0].numpy()
    expected = sitk.GetArrayFromImage(sitk.DICOMOrient(on_grid_of(truth(), read_volume(series)), "LPS"))
    assert np.array_equal(label, np.array([0, 0, 0, 1, 0, 0, 0, 2])[expected])


# ------------------------------------------------------------------------------------- RT Structure Set


def rtstruct(path: Path, image, contours):
    """Name -> list of (slice, points (n, 2) in voxels x, y)."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = uid.RTStructureSetStorage, uid.generate_uid()
    data.StructureSetROISequence, data.ROIContourSequence = [], []
    for number, (name, planes) in enumerate(contours.items(), 11):
        roi, drawn = pydicom.Dataset(), pydicom.Dataset()
        roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber = number, name, number
        drawn.ContourSequence = []
        for slice_, points in planes:
            contour = pydicom.Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
            places = [
                image.TransformContinuousIndexToPhysicalPoint((float(x), float(y), float(slice_)))
                for x, y in points
            ]
            contour.ContourData = [f"{value:.6f}" for place in places for value in place]
            drawn.ContourSequence.append(contour)
        data.StructureSetROISequence.append(roi)
        data.ROIContourSequence.append(drawn)
    data.save_as(path, enforce_file_format=True)
    return path


def circle(x, y, radius):
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)


def disc(x, y, radius):
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def test_contours_are_filled_and_holes_are_not(series, tmp_path):
    image = read_volume(series)
    ring = [(2, circle(12.2, 11.3, 8.1)), (2, circle(12.2, 11.3, 4.2)[::-1]), (2, circle(12.2, 11.3, 1.7))]
    small = [(1, circle(25.3, 4.1, 2.3)), (3, circle(12.2, 11.3, 3.2))]
    path = rtstruct(
        tmp_path / "rs.dcm", image, {"Organ": ring, "lesion": small, "BODY": [(0, circle(9, 9, 8))]}
    )
    expected = np.zeros(SHAPE, np.uint8)
    expected[2][disc(12.2, 11.3, 8.1) & ~disc(12.2, 11.3, 4.2) | disc(12.2, 11.3, 1.7)] = 3
    expected[1][disc(25.3, 4.1, 2.3)] = 7
    expected[3][disc(12.2, 11.3, 3.2)] = 7
    assert np.array_equal(array_of(path, image), expected)


@pytest.mark.parametrize("seed", range(4))
def test_contours_through_the_middles_of_voxels_give_the_mask_that_they_came_from(seed, series, tmp_path):
    """Drawn by OpenCV as rt-utils does, holes and islands included."""
    cv2 = pytest.importorskip("cv2")
    from scipy.ndimage import binary_opening, gaussian_filter

    noise = gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE[1:]), 1.5)
    mask = binary_opening(noise > 0, np.ones((3, 3)))
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    image = read_volume(series)
    path = rtstruct(tmp_path / "rs.dcm", image, {"organ": [(2, one[:, 0]) for one in found]})
    array = array_of(path, image, {"organ": 1})
    assert np.array_equal(array[2] == 1, mask)
    assert not array[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("order", [[], ["organ", "lesion"], ["lesion", "organ"]], ids=str)
def test_structures_that_overlap_need_an_order(order, series, tmp_path):
    image = read_volume(series)
    both = {"organ": [(2, circle(12.2, 11.3, 8.1))], "lesion": [(2, circle(12.2, 11.3, 4.2))]}
    path = rtstruct(tmp_path / "rs.dcm", image, both)
    if not order:
        with pytest.raises(
            DataError, match=r"voxels are lesion and another label too; say with data.overlaps"
        ):
            array_of(path, image)
        return
    wins = LABELS[order[-1]]
    assert (array_of(path, image, order=order)[2][disc(12.2, 11.3, 4.2)] == wins).all()


@pytest.mark.parametrize(("slice_", "word"), [(2.5, "between or across"), (2, "")], ids=["between", "on"])
def test_contours_between_slices_are_refused(slice_, word, series, tmp_path):
    image = read_volume(series)
    path = rtstruct(tmp_path / "rs.dcm", image, {"organ": [(slice_, circle(12.2, 11.3, 8.1))]})
    if word:
        with pytest.raises(DataError, match=word):
            array_of(path, image, {"organ": 1})
    else:
        assert array_of(path, image, {"organ": 1}).any()


def test_a_structure_of_another_name_is_not_silently_absent(series, tmp_path):
    image = read_volume(series)
    path = rtstruct(tmp_path / "rs.dcm", image, {"Parotid_L": [(2, circle(12.2, 11.3, 8.1))]})
    with pytest.raises(DataError, match=r"no segment named parotid left \(there are Parotid_L\)"):
        array_of(path, image, {"parotid left": 1})
