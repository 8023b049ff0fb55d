"""Masks lie on the grid of the scan, whatever it is; a scan that fails does not stop the others."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from torch import nn

from medi3d.datasets.images.settings import Normalisation, VolumeSettings
from medi3d.engine.inference import SlidingWindow, single_forward
from medi3d.engine.precision import Precision
from medi3d.errors import ConfigError, DataError
from medi3d.files import read_table
from medi3d.prediction.memory import resident_bytes
from medi3d.prediction.predict import PredictionOptions, predict_files
from medi3d.prediction.predictor import Predictor
from medi3d.prediction.scans import find_scans


class Threshold(nn.Module):
    """Class 1 where the normalised image is positive: brighter than the middle of its percentiles."""

    def forward(self, x):
        return torch.cat([-x, x], dim=1)


class Inverted(Threshold):
    def forward(self, x):
        return -super().forward(x)


class FirstChannel(Threshold):
    def forward(self, x):
        return super().forward(x[:, :1])


class Counting(Threshold):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(x.shape)
        return super().forward(x)


FP32 = Precision(torch.device("cpu"), bf16=False)
MR = VolumeSettings(root="", modality="MR", labels={"bright": 1})
PREDICTOR = Predictor(MR, Threshold(), single_forward, FP32)


def predict(settings, inputs, out, predictor=PREDICTOR, **options):
    predictor = dataclasses.replace(predictor, data=settings)
    return predict_files([predictor], inputs, out, PredictionOptions(**options))


def bright(array):
    """The threshold network by hand."""
    low, high = np.percentile(array, [0.5, 99.5])
    return np.clip((array.astype(np.float64) - low) * (2 / (high - low)) - 1, -1, 1).astype(np.float32) > 0


@pytest.fixture
def oblique(tmp_path):
    """Anisotropic, turned about two axes, left-handed, its slices along the first axis."""
    turn = np.array([[0.96, -0.25, 0.1], [0.24, 0.966, 0.08], [-0.117, -0.053, 0.992]])
    turn = np.linalg.qr(turn)[0][:, [2, 0, 1]] * [1, -1, 1]
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([6.5, 0.7, 0.7])
    affine[:3, 3] = (-41.5, 13.25, 7.125)
    array = np.random.default_rng(0).normal(size=(9, 20, 24)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_a_mask_of_an_oblique_nifti_lies_on_its_grid(oblique, tmp_path):
    (written,), failed = predict(MR, [oblique], tmp_path / "masks")
    scan, mask = nib.load(oblique), nib.load(written)
    assert not failed
    assert mask.shape == scan.shape
    assert np.array_equal(mask.affine, scan.affine)
    assert np.array_equal(np.asarray(mask.dataobj), bright(np.asarray(scan.dataobj)))


def test_a_resampled_prediction_comes_back_to_the_grid(oblique, tmp_path):
    settings = dataclasses.replace(MR, spacing=[2.0, 1.5, 1.5])
    (written,), failed = predict(settings, [oblique], tmp_path / "masks")
    scan, mask = nib.load(oblique), nib.load(written)
    assert not failed
    assert mask.shape == scan.shape
    assert np.array_equal(mask.affine, scan.affine)


@pytest.mark.parametrize("study", ["Study3/11-T1post-18670", "Study3/11_HCropVolume"])
def test_a_mask_of_a_dicom_series_lies_on_its_grid(shared, tmp_path, study):
    series = shared / "dicom" / "udacity_TestVolumes" / study
    (written,), failed = predict(MR, [series], tmp_path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    scan, mask = reader.Execute(), sitk.ReadImage(written)
    assert not failed
    assert mask.GetSize() == scan.GetSize()
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, name)(), getattr(scan, name)(), atol=1e-4)
    assert np.array_equal(sitk.GetArrayFromImage(mask), bright(sitk.GetArrayFromImage(scan)))


def test_a_scan_that_fails_does_not_stop_the_others(oblique, tmp_path):
    empty = tmp_path / "empty.nii.gz"
    empty.touch()
    written, failed = predict(MR, [empty, tmp_path / "none.mha", oblique], tmp_path / "masks")
    assert [path.name for path in written] == ["scan.nii.gz"]
    assert [line.count("\n") for line in failed] == [0, 0]
    assert "empty" in failed[0]
    assert "no such file" in failed[1]


def test_scans_of_one_name_are_kept_apart(oblique, tmp_path):
    twin = tmp_path / "other" / "scan.nii.gz"
    twin.parent.mkdir()
    twin.write_bytes(oblique.read_bytes())
    written, _ = predict(MR, [oblique, twin], tmp_path / "masks")
    assert [path.name for path in written] == [f"{tmp_path.name}_scan.nii.gz", "other_scan.nii.gz"]


def test_a_scan_is_not_replaced_by_its_mask(oblique):
    with pytest.raises(ConfigError, match="lies in the output folder"):
        predict(MR, [oblique], oblique.parent)


def test_a_sliding_window_gives_the_same_mask(oblique, tmp_path):
    windows = dataclasses.replace(PREDICTOR, inferer=SlidingWindow((8, 8, 8)))
    ((whole,), _), ((parts,), _) = (
        predict(MR, [oblique], tmp_path / name, one)
        for name, one in (("whole", PREDICTOR), ("parts", windows))
    )
    assert whole.read_bytes() == parts.read_bytes()


def test_an_ensemble_averages_probabilities(oblique, tmp_path):
    against = dataclasses.replace(PREDICTOR, network=Inverted())
    (plain,), _ = predict(MR, [oblique], tmp_path / "plain")
    for others, expected in (([PREDICTOR, against], True), ([against, against], False)):
        members = [PREDICTOR, *others]
        out = tmp_path / str(expected)
        (mask,), _ = predict_files(members, [oblique], out)
        same = np.array_equal(nib.load(mask).dataobj, nib.load(plain).dataobj)
        assert same == expected


def test_members_of_an_ensemble_see_the_scan_on_their_own_grids(oblique, tmp_path):
    coarse = dataclasses.replace(PREDICTOR, data=dataclasses.replace(MR, spacing=[2.0, 2.0, 2.0]))
    (written,), failed = predict_files([PREDICTOR, coarse], [oblique], tmp_path / "masks")
    assert not failed
    assert nib.load(written).shape == nib.load(oblique).shape


def test_volume_and_confidence_are_told(oblique, tmp_path):
    (written,), _ = predict(MR, [oblique], tmp_path / "masks")
    (row,) = read_table(tmp_path / "masks" / "predictions.csv")
    voxels = int(np.asarray(nib.load(written).dataobj).sum())
    assert (row["case"], row["label"], row["voxels"]) == ("scan", "bright", voxels)
    assert row["volume_ml"] == pytest.approx(voxels * 6.5 * 0.7 * 0.7 / 1000, rel=1e-4)
    assert 0.5 < row["confidence"] < 1


def test_only_the_largest_component_is_kept_where_validation_said_so(oblique, tmp_path):
    keeping = dataclasses.replace(PREDICTOR, largest=[1])
    (written,), _ = predict(MR, [oblique], tmp_path / "masks", keeping)
    _, parts = ndimage.label(np.asarray(nib.load(written).dataobj), np.ones((3, 3, 3)))
    assert parts == 1


def test_finished_masks_are_kept_until_scan_mask_or_network_change(oblique, tmp_path):
    out, seen = tmp_path / "masks", []
    network = Counting(seen)

    def again(identity="a", **options):
        seen.clear()
        predict(
            MR, [oblique], out, dataclasses.replace(PREDICTOR, network=network, identity=identity), **options
        )
        return bool(seen)

    assert again()
    assert not again()
    assert again(overwrite=True)
    assert again("b")
    assert not again("b")
    (out / "scan.nii.gz").write_bytes(b"changed")
    assert not again("b")  # corrected by hand: it is left alone
    (out / "scan.nii.gz").unlink()
    assert again("b")
    oblique.write_bytes(oblique.read_bytes())
    assert not again("b")
    image = nib.load(oblique)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), oblique)
    assert again("b")


@pytest.mark.parametrize("memory", [0.1, 1000.0])
def test_a_scan_that_needs_more_memory_is_refused_before_it_is_read(memory, oblique, tmp_path):
    options = {"memory_gb": resident_bytes() / 1e9 + memory}
    written, failed = predict(MR, [oblique], tmp_path / "masks", **options)
    assert (len(written), len(failed)) == ((0, 1) if memory < 1 else (1, 0))
    assert all("needs about" in line for line in failed)


def test_files_named_by_channel_are_one_case(oblique, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("one_0000", "one_0001", "two_0000", "two_0001"):
        (folder / f"{name}.nii.gz").write_bytes(oblique.read_bytes())
    both = dataclasses.replace(MR, channels=2)
    first = dataclasses.replace(PREDICTOR, network=FirstChannel())
    written, failed = predict(both, [folder], tmp_path / "masks", first)
    assert not failed
    assert [path.name for path in written] == ["one.nii.gz", "two.nii.gz"]


def test_a_folder_with_slices_and_volumes_is_refused(oblique, tmp_path):
    (tmp_path / "slice.dcm").touch()
    with pytest.raises(DataError, match="lies beside DICOM slices"):
        predict(MR, [tmp_path], tmp_path / "masks")


def test_volumes_and_the_series_in_folders_beside_them_are_found(oblique, write_series, tmp_path, caplog):
    """With the masks of an earlier run, a folder of something else and a link back among them."""
    folder = tmp_path / "scans"
    series = write_series([0.0, 3.0, 6.0], folder="ct")
    for slice_ in series.iterdir():
        slice_.rename(slice_.with_suffix(""))
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "read.me").write_text("no scan")
    series.rename(folder / "ct")
    (folder / "ct" / "again").symlink_to(folder)
    (folder / "scan.nii.gz").write_bytes(oblique.read_bytes())
    out = folder / "masks"
    for _ in range(2):
        assert [scan.name for scan in find_scans([folder], out, 1, "same")] == ["scan", "ct"]
        predict(MR, [folder / "scan.nii.gz"], out)
    assert "notes: no scan in this folder; left out" in caplog.text


@pytest.mark.parametrize(("suffix", "format"), [(".nrrd", "nrrd"), (".mha", "mha"), (".nii", "nii")])
def test_the_format_can_be_chosen(suffix, format, oblique, tmp_path):
    (written,), _ = predict(MR, [oblique], tmp_path / "masks", format=format)
    assert written.name == f"scan{suffix}"


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom", "ignore::UserWarning:highdicom")
def test_a_dicom_seg_lies_beside_the_mask_of_a_series(shared, oblique, tmp_path):
    hd = pytest.importorskip("highdicom")
    series = shared / "dicom" / "udacity_TestVolumes" / "Study1" / "13_HCropVolume"
    written, failed = predict(MR, [series, oblique], tmp_path / "masks", format="seg")
    assert not failed
    seg = hd.seg.segread(tmp_path / "masks" / "13_HCropVolume.seg.dcm")
    volume = seg.get_volume(combine_segments=True, rescale_fractional=False)
    assert volume.array.sum() == sitk.GetArrayFromImage(sitk.ReadImage(written[0])).sum()
    assert sorted(path.name for path in (tmp_path / "masks").glob("*.dcm")) == ["13_HCropVolume.seg.dcm"]


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_one_of_several_series_in_a_folder_is_predicted(write_series, tmp_path):
    pixels = np.random.default_rng(0).integers(900, 1500, (3, 20, 16))
    write_series([0.0, 3.0, 6.0], uid="1.8", SeriesNumber=3, pixels=pixels)
    folder = write_series([0.0, 3.0, 6.0], uid="1.9", SeriesNumber=4, pixels=pixels[::-1])
    chosen = [folder.with_name(f"{folder.name}#{choice}") for choice in ("3", "1.9")]
    written, failed = predict(MR, [*chosen, folder], tmp_path / "masks")
    assert [path.name for path in written] == ["series_3.nii.gz", "series_1.9.nii.gz"]
    assert ["2 DICOM series" in line for line in failed] == [True]
    masks = [nib.load(path).get_fdata().T > 0 for path in written]
    assert np.array_equal(masks[0], bright(pixels - 1024.0))
    assert np.array_equal(masks[1], masks[0][::-1])


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_no_earlier_mask_stands_for_a_scan_that_fails(oblique, tmp_path, how):
    """Neither in the folder nor in the table; the masks of others stay."""
    other = tmp_path / "other.nii.gz"
    other.write_bytes(oblique.read_bytes())
    out = tmp_path / "masks"
    predict(MR, [oblique, other], out)
    if how == "gone":
        oblique.unlink()
    else:
        oblique.write_bytes(oblique.read_bytes()[:200])
    written, failed = predict(MR, [oblique, other], out)
    assert (written, len(failed)) == ([out / "other.nii.gz"], 1)
    assert [path.name for path in out.glob("*.nii.gz")] == ["other.nii.gz"]
    assert {row["case"] for row in read_table(out / "predictions.csv")} == {"other"}


def test_no_seg_of_an_earlier_run_stands_beside_a_new_mask(shared, tmp_path):
    series = shared / "dicom/udacity_TestVolumes/Study1/13_HCropVolume"
    predict(MR, [series], tmp_path, format="seg")
    assert (tmp_path / "13_HCropVolume.seg.dcm").is_file()
    inverted = dataclasses.replace(PREDICTOR, network=Inverted(), identity="inverted")
    (written,), _ = predict(MR, [series], tmp_path, inverted)
    assert written.is_file()
    assert not (tmp_path / "13_HCropVolume.seg.dcm").exists()


def test_seg_of_a_compressed_ct(shared, tmp_path):
    """JPEG 2000, slices that overlap: the SEG names each slice of the series, and holds the mask."""
    import pydicom

    window = Normalisation("window", window=[-1000, 1000])
    settings = VolumeSettings(root="", modality="CT", labels={"dense": 4}, normalisation=window)
    series = shared / "dicom/totalsegmentator_ct/series"
    (written,), failed = predict(settings, [series], tmp_path, format="seg")
    assert not failed
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(written)))
    seg = pydicom.dcmread(tmp_path / "series.seg.dcm")
    slices = [pydicom.dcmread(path, stop_before_pixels=True) for path in series.iterdir()]
    sources = seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {item.ReferencedSOPInstanceUID for item in sources} == {
        one.file_meta.MediaStorageSOPInstanceUID for one in slices
    }  # an anonymiser emptied SOPInstanceUID itself, and the UIDs of study and series
    assert len(slices) == 20
    assert seg.StudyInstanceUID
    assert set(np.unique(mask)) == {0, 4}
    assert seg.pixel_array.sum() == (mask == 4).sum()
