"""Folders as people have them: what is no slice is left out and said, the slices lie where they did."""

import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import uid

from medi3d.datasets.images import dicom
from medi3d.datasets.images.dicom import read_slices
from medi3d.datasets.images.files import read_header, read_volume, write_mask
from medi3d.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

EVEN = [0.0, 2.5, 5.0, 7.5]
ACROSS = (0, 1, 0, 0, 0, -1)
RNG = np.random.default_rng(0)


def values(path):
    return sitk.GetArrayFromImage(read_volume(path))


def other_object(folder, name, sop):
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = (
        sop,
        uid.generate_uid(),
        uid.generate_uid(),
    )
    data.save_as(folder / name, enforce_file_format=True)


def change(path, **tags):
    data = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(data, name, value) if value is not None else delattr(data, name)
    data.save_as(path)
    return path


def beside(kind, folder, write_series):
    """Something that is no slice, in the folder; returns a word of what is said of it."""
    if kind == "RTSTRUCT":
        other_object(folder, "rs.dcm", uid.RTStructureSetStorage)
        return "RT Structure Set rs.dcm"
    if kind == "SR":
        other_object(folder, "sr", uid.BasicTextSRStorage)
        return "Basic Text SR sr"
    if kind == "SEG":
        other_object(folder, "seg.dcm", uid.SegmentationStorage)
        return "Segmentation seg.dcm"
    if kind == "of macOS":
        (folder / "._1.2.3.4-999.dcm").write_bytes(bytes.fromhex("00051607") + bytes(200))
        return r"hidden files ._1.2.3.4-999.dcm"
    series = "1.2.3.4" if "in the series" in kind else "1.9"
    orientation = (1, 0, 0, 0, 1, 0) if "colour" in kind else ACROSS
    made = write_series([3.0], uid=series, folder="beside", orientation=orientation)
    path = made / f"{series}-999.dcm"
    if "marked" in kind:
        change(path, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    if "colour" in kind:
        rgb = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
        eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": bytes(90)}
        change(path, **rgb, **eight, ImagePositionPatient=None, ImageOrientationPatient=None)
    path.rename(folder / "0.dcm")
    return "0.dcm" if "in the series" in kind else "1.9"


KINDS = ["RTSTRUCT", "SR", "SEG", "of macOS", "marked scout in the series", "scout in the series"]
KINDS += ["scout", "colour picture", "colour picture in the series"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_slice_is_left_out_and_said(kind, write_series, caplog):
    folder = write_series(EVEN)
    expected = values(folder)
    word = beside(kind, folder, write_series)
    assert np.array_equal(values(folder), expected)
    assert f"{folder}: left out beside the slices" in caplog.text
    assert word in caplog.text


def test_a_slice_that_lost_its_series_is_not_left_out(write_series):
    """One slice of another UID, in size, spacing and direction like the others."""
    folder = write_series(EVEN)
    change(folder / "1.2.3.4-996.dcm", SeriesInstanceUID="1.9")
    with pytest.raises(DataError, match=r"2 DICOM series.*1\.9"):
        read_volume(folder)


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    other_object(tmp_path, "rs.dcm", uid.RTStructureSetStorage)
    with pytest.raises(DataError, match=r"no DICOM series.*RT Structure Set rs.dcm"):
        read_volume(tmp_path)


OBLIQUE = (1, 0, 0, 0, 0.8, 0.6)


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), OBLIQUE], ids=["axial", "oblique"])
@pytest.mark.parametrize(("step", "digits"), [(0.625, 1), (0.35, 1), (1.25, 1), (2.5, 0), (3.25, 0)])
def test_rounded_positions_are_those_of_even_slices(step, digits, orientation, write_series):
    count = 40
    folder = write_series([step * k for k in range(count)], digits=digits, orientation=orientation)
    image = read_volume(folder)
    assert image.GetSize()[2] == count
    assert image.GetSpacing()[2] == pytest.approx(step, abs=2 * 0.5 * 10**-digits / (count - 1) * 1.5)
    normal = np.cross(orientation[:3], orientation[3:])
    np.testing.assert_allclose(np.reshape(image.GetDirection(), (3, 3))[:, 2], normal, atol=1e-6)


@pytest.mark.parametrize("lacking", [1, 2, 20, 37, 38])
@pytest.mark.parametrize("step", [0.35, 0.625, 1.25])
def test_a_slice_that_lacks_among_rounded_ones_is_missed(step, lacking, write_series):
    places = [step * k for k in range(40) if k != lacking]
    with pytest.raises(DataError, match="slice missing"):
        read_slices(write_series(places, digits=1))


@pytest.mark.parametrize("how", ["same file", "new UID"])
def test_copies_of_slices_are_dropped(how, write_series, caplog):
    folder = write_series(EVEN)
    expected = values(folder)
    for number in (997, 998):
        copy = shutil.copy(folder / f"1.2.3.4-{number}.dcm", folder / f"1.2.3.4-{number} (1).dcm")
        if how == "new UID":
            change(copy, SOPInstanceUID=uid.generate_uid())
    assert np.array_equal(values(folder), expected)
    assert "2 copies of slices left out: 1.2.3.4-998 (1).dcm, 1.2.3.4-997 (1).dcm" in caplog.text


def test_one_instance_with_two_contents_is_refused(write_series):
    folder = write_series(EVEN)
    copy = shutil.copy(folder / "1.2.3.4-997.dcm", folder / "again.dcm")
    change(copy, PixelData=bytes(60))
    with pytest.raises(DataError, match=r"no distance between .*again.dcm"):
        read_volume(folder)


def test_one_of_several_series_is_chosen_by_number_or_uid(write_series):
    folder = write_series(EVEN, uid="1.8", SeriesNumber=3, SeriesDescription="portal venous")
    write_series([0.0, 1.0, 2.0], uid="1.9", SeriesNumber=12)
    with pytest.raises(DataError) as caught:
        read_volume(folder)
    line = str(caught.value)
    assert "#3 'portal venous' CT 5x6x4 1.8 (4 files); #12 CT 5x6x3 1.9 (3 files)" in line
    assert "series#NUMBER" in line
    assert "\n" not in line
    for choice, count in (("3", 4), ("1.8", 4), ("12", 3), ("1.9", 3)):
        chosen = folder.with_name(f"{folder.name}#{choice}")
        assert read_volume(chosen).GetSize()[2] == read_header(chosen).size[2] == count
    with pytest.raises(DataError, match="no series fits; there are #3"):
        read_volume(folder.with_name("series#4"))


def test_a_number_that_two_series_have_chooses_none(write_series):
    folder = write_series(EVEN, uid="1.8", SeriesNumber=3)
    write_series(EVEN, uid="1.9", SeriesNumber=3)
    with pytest.raises(DataError, match="2 of the series fit"):
        read_volume(folder.with_name("series#3"))


@pytest.mark.parametrize("degrees", [20, -12])
def test_a_tilted_gantry_is_straightened_and_the_mask_brought_back(degrees, write_series, tmp_path, caplog):
    """A brightness that is linear in space is so on the straight grid; the mask is one for each slice."""
    turn = np.radians(degrees)
    down = np.array([0, np.cos(turn), -np.sin(turn)])
    places = np.array([[10.0, -20.0, 30.0 + 3 * k] for k in range(8)])
    rows, columns = np.mgrid[:40, :30]
    points = places[:, None, None] + columns[..., None] * [0.5, 0, 0] + rows[..., None] * 0.75 * down
    stored = np.round(2000 + 20 * points @ [1, 2, 3])
    folder = write_series([0.0] * 8, orientation=(1, 0, 0, *down), pixels=stored)
    for number, place in enumerate(places):
        change(folder / f"1.2.3.4-{999 - number}.dcm", ImagePositionPatient=place.tolist())
    image = read_volume(folder)
    assert f"tilted by {abs(degrees):.1f} degrees" in caplog.text
    array = sitk.GetArrayFromImage(image)
    axes = np.reshape(image.GetDirection(), (3, 3))
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    filled = array > array.min()
    filled[:, 1:-1] &= filled[:, 2:] & filled[:, :-2]  # at the border half a voxel goes on from it
    inside = np.argwhere(filled[:, 1:-1])
    inside[:, 1] += 1
    assert len(inside) > 0.9 * stored.size
    for z, y, x in inside[:: len(inside) // 50]:
        point = np.array(image.TransformIndexToPhysicalPoint((int(x), int(y), int(z))))
        assert array[z, y, x] == pytest.approx(2000 - 1024 + 20 * point @ [1, 2, 3], abs=1.1)
    threshold = float(np.median(stored)) - 1024
    write_mask(sitk.Cast(image > threshold, sitk.sitkUInt8), folder, tmp_path / "mask.nii.gz")
    nib = pytest.importorskip("nibabel")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == (30, 40, 8)
    where = mask.affine @ [3, 7, 5, 1] * [-1, -1, 1, 1]
    np.testing.assert_allclose(where[:3], points[5, 7, 3], atol=1e-3)
    same = (stored - 1024 > threshold) == np.asarray(mask.dataobj).T
    assert same.mean() > 0.97  # the nearest voxel may lie half a voxel away


@pytest.mark.parametrize("name", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless"])
def test_compressed_slices_have_the_values_of_raw_ones(name, write_series):
    needed = {"JPEGLSLossless": "jpeg_ls", "JPEG2000Lossless": "openjpeg"}
    if name in needed:
        pytest.importorskip(needed[name])
    folder = write_series(EVEN, pixels=RNG.integers(0, 4096, (4, 64, 64)))
    expected = values(folder)
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.compress(getattr(uid, name))
        data.save_as(path)
    assert np.array_equal(values(folder), expected)


def test_a_missing_decoder_is_named(write_series, monkeypatch):
    folder = write_series(EVEN)
    for path in folder.iterdir():
        data = path.read_bytes()
        path.write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))

    def none(*args, **kwargs):
        raise RuntimeError(
            "all plugins are missing dependencies:\n\tpylibjpeg - requires pylibjpeg-openjpeg>=2"
        )

    monkeypatch.setattr(dicom, "pixel_array", none)
    with pytest.raises(DataError, match=r"install medi3d\[dicom\].*pylibjpeg-openjpeg") as caught:
        read_volume(folder)
    assert "\n" not in str(caught.value)


def enhanced(tmp_path, kind, stored, places, slopes):
    """A multi-frame file; frame k lies at places[k]. The MR has a slope for each frame, the CT shares one."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.SOPClassUID = uid.EnhancedMRImageStorage if kind == "MR" else uid.EnhancedCTImageStorage
    data.SOPInstanceUID, data.SeriesInstanceUID, data.StudyInstanceUID = "1.2.9.1", "1.2.9", "1.2.8"
    data.Modality, data.FrameOfReferenceUID, data.SamplesPerPixel = kind, "1.2.7", 1
    data.NumberOfFrames, data.Rows, data.Columns = stored.shape
    data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15

    def group(**tags):
        item = pydicom.Dataset()
        for name, value in tags.items():
            setattr(item, name, value)
        return [item]

    rescale = [group(RescaleSlope=slope, RescaleIntercept=-5, RescaleType="US") for slope in slopes]
    shared, frames = pydicom.Dataset(), []
    shared.PixelMeasuresSequence = group(PixelSpacing=[0.75, 0.5])
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    for place, own in zip(places, rescale, strict=True):
        frame = pydicom.Dataset()
        frame.PlanePositionSequence = group(ImagePositionPatient=[1.0, 2.0, place])
        if kind == "MR":
            frame.PixelValueTransformationSequence = own
        frames.append(frame)
    if kind == "CT":
        shared.PixelValueTransformationSequence = rescale[0]
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = [shared], frames
    data.PixelData = stored.astype(np.uint16).tobytes()
    data["PixelData"].VR = "OW"
    (tmp_path / "multi").mkdir(exist_ok=True)
    data.save_as(tmp_path / "multi" / "all.dcm", enforce_file_format=True)
    return tmp_path / "multi"


STORED = RNG.integers(0, 4000, (4, 6, 5))


@pytest.mark.parametrize("by_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("kind", ["CT", "MR"])
def test_frames_lie_where_they_say(kind, by_file, tmp_path):
    slopes = [2.0, 0.5, 1.5, 1.0] if kind == "MR" else [2.0] * 4
    folder = enhanced(tmp_path, kind, STORED, [7.5, 2.5, 10.0, 5.0], slopes)
    image = read_volume(folder / "all.dcm" if by_file else folder)
    order = [1, 3, 0, 2]
    expected = np.stack([STORED[k] * slopes[k] - 5 for k in order])
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), expected)
    assert image.GetSpacing() == pytest.approx((0.5, 0.75, 2.5))
    assert image.GetOrigin() == pytest.approx((1, 2, 2.5))


def test_frames_of_one_place_are_refused(tmp_path):
    folder = enhanced(tmp_path, "MR", STORED, [0.0, 2.5, 0.0, 2.5], [1.0] * 4)
    with pytest.raises(DataError, match=r"no distance between all.dcm frame 1 and all.dcm frame 3"):
        read_volume(folder)


def test_a_seg_of_frames_is_read_back(tmp_path):
    pytest.importorskip("highdicom")
    from medi3d.datasets.images.dicom_labels import read_dicom_labels
    from medi3d.datasets.images.dicom_seg import write_seg

    folder = enhanced(tmp_path, "MR", STORED, [7.5, 2.5, 10.0, 5.0], [1.0] * 4)
    image = read_volume(folder)
    mask = sitk.Cast(image > 2000, sitk.sitkUInt8) * 3
    write_seg(mask, {"bright": 3}, folder, tmp_path / "seg.dcm", version="1")
    found = read_dicom_labels(tmp_path / "seg.dcm", {"bright": 3}, image)
    assert np.array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(mask))
