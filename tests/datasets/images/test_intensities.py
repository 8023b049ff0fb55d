"""Each channel by its own normalisation; background, NaN and missing channels; very small voxels."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from medi3d.datasets.cohorts.cache import cache_path
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.files import read_volume
from medi3d.datasets.images.preprocessing import load_image, normalise, to_canonical
from medi3d.datasets.images.settings import ChannelSettings, Normalisation, VolumeSettings
from medi3d.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
OBJECT = RNG.normal(400, 50, (6, 6, 6)).astype(np.float32)
IGNORED = Normalisation(background="ignored")
SETTINGS = VolumeSettings("", "MR", {"a": 1})


@pytest.mark.parametrize("value", [0.0, -1024.0, 3e4], ids=str)
def test_percentiles_of_an_object_in_a_wide_background_are_the_objects(value):
    wide = np.pad(OBJECT, 12, constant_values=value)
    inside = (slice(12, -12),) * 3
    expected = normalise(OBJECT, Normalisation())
    np.testing.assert_allclose(normalise(wide, IGNORED)[inside], expected, atol=1e-5)
    clipped = (np.abs(normalise(wide, Normalisation())[inside]) == 1).mean()
    assert clipped > 0.5  # as before there was a key
    scored = normalise(wide, Normalisation("zscore", background="ignored"))[inside]
    assert (scored.mean(), scored.std()) == pytest.approx((0, 1), abs=1e-4)


def test_a_scan_without_constant_background_is_as_before():
    np.testing.assert_array_equal(normalise(OBJECT, IGNORED), normalise(OBJECT, Normalisation()))


def test_each_channel_has_its_own_normalisation(write_nifti):
    ct, pet = write_nifti(OBJECT, name="a.nii"), write_nifti(OBJECT / 100, name="b.nii")
    window = Normalisation("window", window=[300.0, 500.0])
    channels = [ChannelSettings("CT", "CT", window), ChannelSettings("PET", "PET")]
    settings = VolumeSettings("", "CT", {"a": 1}, channels=2, by_channel=channels)
    image = load_image([ct, pet], settings).image.numpy()
    shown = OBJECT[::-1, ::-1].T
    np.testing.assert_allclose(image[0], np.clip((shown - 400) / 100, -1, 1), atol=1e-5)
    np.testing.assert_allclose(image[1], normalise(shown, Normalisation()), atol=1e-4)
    assert image.std(axis=(1, 2, 3)).min() > 0.1


def test_a_window_beyond_a_channel_is_reported(write_nifti, caplog):
    settings = replace(SETTINGS, modality="CT", normalisation=Normalisation("window", window=[-200.0, 0.0]))
    load_image([write_nifti(OBJECT)], settings)
    assert "channel 0 has no contrast in the window [-200.0, 0.0]" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": 2, "by_channel": [ChannelSettings("T1", "MR")]}, "by_channel names 1 channels"),
        ({"by_channel": [ChannelSettings("PET", "PET")]}, "modality is 'MR'"),
        ({"nan": "zero"}, "nan is 'zero': refuse or background"),
        ({"missing_channels": "copy"}, "missing_channels is 'copy': refuse or zeros"),
        ({"modality": "CT"}, "for CT: its values are in HU"),
    ],
)
def test_settings_that_contradict_each_other(change, words):
    with pytest.raises(ConfigError, match=words):
        replace(SETTINGS, **change)
    with pytest.raises(ConfigError, match=r"channel CT: .*for CT"):
        ChannelSettings("CT", "CT")


def test_nan_outside_of_the_body_is_background_where_that_is_said(write_nifti):
    body = np.pad(OBJECT, 6, constant_values=np.nan)
    path = write_nifti(body)
    with pytest.raises(DataError, match=r"5616 voxels are NaN .*data\.nan=background"):
        load_image([path], SETTINGS)
    image = load_image([path], replace(SETTINGS, nan="background")).image[0].numpy()
    inside = (slice(6, -6),) * 3
    expected = normalise(OBJECT[OBJECT.min() < OBJECT], Normalisation())  # the lowest value is background now
    assert np.sort(image[inside].ravel())[1:] == pytest.approx(np.sort(expected), abs=1e-5)
    image[inside] = -1
    assert (image == -1).all()
    body[0, 0, 0] = np.inf
    with pytest.raises(DataError, match=r"5616 voxels are NaN or infinite; every voxel must be a number$"):
        load_image([write_nifti(body)], replace(SETTINGS, nan="background"))


def test_a_missing_channel_is_zeros_where_that_is_said(write_nifti):
    paths = [write_nifti(OBJECT, name="a.nii"), write_nifti(OBJECT * 0, name="b.nii")]
    two = replace(SETTINGS, channels=2)
    with pytest.raises(DataError, match=r"b\.nii: every voxel is 0.* data\.missing_channels=zeros"):
        load_image(paths, two)
    image = load_image(paths, replace(two, missing_channels="zeros")).image
    assert image[0].std() > 0.3
    assert not image[1].any()
    with pytest.raises(DataError, match="no channel of this case has contrast"):
        load_image(paths[1:] * 2, replace(two, missing_channels="zeros"))


@pytest.mark.parametrize(
    ("side", "target", "same"),
    [
        *[(0.0108, 0.01, False), (0.01002, 0.01, True), (0.0011, 0.001, False)],
        *[(1.0005, 1.0, True), (1.002, 1.0, False)],
    ],
)
def test_small_voxels_are_told_apart_by_their_share(side, target, same, write_nifti):
    image = read_volume(write_nifti(OBJECT, np.diag([side, side, side, 1.0])))
    canonical = to_canonical(image, (target,) * 3)
    assert (canonical.GetSize() == image.GetSize()) == same
    assert canonical.GetSpacing() == pytest.approx(image.GetSpacing() if same else (target,) * 3)


def test_younger_keys_leave_the_names_of_old_caches(tmp_path):
    (tmp_path / "scan.raw").write_bytes(b"voxels")
    case = Case("a", (tmp_path / "scan.raw",), None, "a")
    settings = replace(SETTINGS, cache="cache")
    # As the version before these keys named it.
    assert cache_path(case, settings).name == "a-304f29a631691e5c447438abb62d888f.safetensors"
    for change in ({"nan": "background"}, {"missing_channels": "zeros"}, {"normalisation": IGNORED}):
        assert cache_path(case, replace(settings, **change)) != cache_path(case, settings)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nibabel leaves .mgh open
@pytest.mark.parametrize("name", ["scan.mgz", "scan.mgh", "scan.img", "scan.hdr", "scan.IMG"])
def test_formats_of_freesurfer_and_spm(name, tmp_path):
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = 5, -6, 7
    kind = nib.freesurfer.MGHImage if "mg" in name else nib.Nifti1Pair
    nib.save(kind(OBJECT, affine), tmp_path / name.replace("hdr", "img").lower())
    if name == "scan.IMG":
        (tmp_path / "scan.img").rename(tmp_path / name)
        (tmp_path / "scan.hdr").rename(tmp_path / "scan.HDR")
    image = read_volume(tmp_path / name)
    assert image.TransformIndexToPhysicalPoint((1, 2, 3)) == pytest.approx((-4, 2, 16))
    assert image[1, 2, 3] == OBJECT[1, 2, 3]
