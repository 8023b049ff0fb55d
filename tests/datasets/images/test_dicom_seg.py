"""A DICOM SEG, read back by highdicom, holds the mask and names the slices that it lies on."""

import warnings

import numpy as np
import pytest
import SimpleITK as sitk

from medi3d.datasets.images.dicom import read_slices
from medi3d.datasets.images.dicom_seg import write_seg
from medi3d.datasets.images.files import read_volume
from medi3d.errors import DataError, ShapeError

hd = pytest.importorskip("highdicom")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom", "ignore::UserWarning:highdicom")

LABELS = {"dark": 3, "bright": 7}
OBLIQUE = (0.8, 0.6, 0.0, -0.6, 0.8, 0.0)


def mask_of(image):
    array = sitk.GetArrayFromImage(image)
    values = np.digitize(array, np.percentile(array, [60, 90]))
    mask = sitk.GetImageFromArray(np.array([0, 3, 7], np.uint8)[values])
    mask.CopyInformation(image)
    return mask


def read_back(path, series):
    """Values (slices, rows, columns) in the order of the series, and the segments' names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = hd.seg.segread(path)
    uids = [_uid(one.path) for one in read_slices(series)]
    frames = seg.get_pixels_by_source_instance(uids, combine_segments=True, ignore_spatial_locations=True)
    return seg, uids, frames


def _uid(path):
    import pydicom

    return pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID


def check(series, tmp_path):
    image = read_volume(series)
    mask = mask_of(image)
    write_seg(mask, LABELS, series, tmp_path / "mask.dcm", version="1")
    seg, uids, frames = read_back(tmp_path / "mask.dcm", series)
    np.testing.assert_array_equal(np.array([0, 3, 7])[frames], sitk.GetArrayFromImage(mask))
    assert [one.segment_label for one in map(seg.get_segment_description, seg.segment_numbers)] == [*LABELS]
    named = {
        item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert named == set(uids)
    return seg, mask


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), OBLIQUE], ids=["axial", "oblique"])
def test_a_generated_series(orientation, write_series, tmp_path):
    series = write_series([3.0 * n for n in (2, 0, 1, 3)], orientation=orientation)
    seg, _ = check(series, tmp_path)
    assert seg.SegmentationType == "BINARY"


@pytest.mark.parametrize(
    "name", ["udacity_TestVolumes/Study1/13_HCropVolume", "udacity_TestVolumes/Study3/11-T1post-18670"]
)
def test_a_real_series(name, shared, tmp_path):
    seg, mask = check(shared / "dicom" / name, tmp_path)
    position = seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
    index = mask.TransformPhysicalPointToContinuousIndex([float(v) for v in position])
    assert np.allclose(index[:2], 0, atol=0.01)


def test_an_empty_mask_is_an_object_too(write_series, tmp_path):
    series = write_series([0.0, 3.0, 6.0])
    empty = sitk.Cast(read_volume(series) * 0, sitk.sitkUInt8)
    write_seg(empty, LABELS, series, tmp_path / "mask.dcm", version="1")
    assert not read_back(tmp_path / "mask.dcm", series)[2].any()


def test_equal_masks_give_equal_identifiers(write_series, tmp_path):
    series = write_series([0.0, 3.0, 6.0])
    mask = mask_of(read_volume(series))
    for name in ("a.dcm", "b.dcm"):
        write_seg(mask, LABELS, series, tmp_path / name, version="1")
    assert _uid(tmp_path / "a.dcm") == _uid(tmp_path / "b.dcm")


def test_a_mask_of_another_grid_is_refused(write_series, tmp_path):
    mask = mask_of(read_volume(write_series([0.0, 3.0, 6.0])))
    other = write_series([0.0, 4.0, 8.0], folder="other")
    with pytest.raises(ShapeError, match="not on the grid"):
        write_seg(mask, LABELS, other, tmp_path / "mask.dcm", version="1")
    assert not (tmp_path / "mask.dcm").exists()


def test_a_series_without_frame_of_reference_is_refused(write_series, tmp_path):
    series = write_series([0.0, 3.0, 6.0], FrameOfReferenceUID=None)
    with pytest.raises(DataError, match="Frame Of Reference"):
        write_seg(mask_of(read_volume(series)), LABELS, series, tmp_path / "mask.dcm", version="1")


def test_slices_that_share_an_instance_uid_are_read_but_get_no_seg(write_series, tmp_path):
    series = write_series([0.0, 3.0, 6.0], SOPInstanceUID="1.2.3.9")
    image = read_volume(series)
    assert sitk.GetArrayFromImage(image)[:, 0, 0].tolist() == [-24, -23, -22]
    with pytest.raises(DataError, match=r"3 different slices have the SOPInstanceUID 1\.2\.3\.9") as caught:
        write_seg(mask_of(image), LABELS, series, tmp_path / "mask.dcm", version="1")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mask.dcm").exists()


def test_a_series_without_thickness_gets_a_seg_of_its_steps(write_series, tmp_path):
    seg, _ = check(write_series([0.0, 3.0, 6.0], SliceThickness=None), tmp_path)
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 3


def test_a_seg_of_a_tilted_gantry_lies_on_the_slices(write_series, tmp_path):
    """The tilt moves each slice by whole rows, so that nothing is interpolated."""
    noise = np.random.default_rng(0).integers(1500, 2500, (4, 30, 20))
    series = write_series([3.0 * k for k in range(4)], drift=0.25, pixels=noise)
    mask = sitk.Cast(read_volume(series) > 900.5, sitk.sitkUInt8) * 3
    write_seg(mask, LABELS, series, tmp_path / "mask.dcm", version="1")
    frames = read_back(tmp_path / "mask.dcm", series)[2]
    np.testing.assert_array_equal(frames > 0, noise - 1024 > 900.5)
