"""Laws of the way to the network's grid and back: nothing is lost without resampling, little with it."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medi3d.datasets.images.files import read_volume, write_mask
from medi3d.datasets.images.preprocessing import load_image, normalise, restore_mask, to_array, to_canonical
from medi3d.datasets.images.settings import Normalisation, VolumeSettings
from medi3d.errors import ConfigError, DataError, ShapeError

LABELS = {"one": 1, "two": 2, "three": 3}


def rotation(seed: int) -> np.ndarray:
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix


def grid(size, spacing, axes=None) -> sitk.Image:
    """An empty scan whose centre lies at (5, -6, 7) mm; size and spacing are (x, y, z)."""
    axes = np.eye(3) if axes is None else axes
    image = sitk.Image([int(n) for n in size], sitk.sitkUInt8)
    image.SetSpacing([float(side) for side in spacing])
    image.SetDirection(axes.ravel().tolist())
    image.SetOrigin((np.array([5, -6, 7]) - axes @ ((np.array(size) - 1) / 2 * spacing)).tolist())
    return image


def ellipsoids(image: sitk.Image, seed: int = 0) -> sitk.Image:
    """Three labelled ellipsoids of 9 to 15 mm, the same ones in space whatever the grid."""
    rng = np.random.default_rng(seed)
    index = np.stack(np.meshgrid(*map(np.arange, image.GetSize()), indexing="ij"), -1)
    axes = np.reshape(image.GetDirection(), (3, 3))
    points = (index * image.GetSpacing()) @ axes.T + image.GetOrigin() - [5, -6, 7]
    labels = np.zeros(points.shape[:3], np.uint8)
    for value in (1, 2, 3):
        centre, radii, turn = rng.uniform(-10, 10, 3), rng.uniform(9, 15, 3), rotation(seed + value)
        labels[((((points - centre) @ turn) / radii) ** 2).sum(-1) < 1] = value
    filled = sitk.GetImageFromArray(labels.T)
    filled.CopyInformation(image)
    return filled


def dice(first: sitk.Image, second: sitk.Image) -> float:
    """Of the worst label."""
    a, b = sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second)
    return min(2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in (1, 2, 3))


GRIDS = {
    "isotropic": grid((60, 60, 60), (1, 1, 1)),
    "anisotropic": grid((60, 64, 24), (1, 1, 2.5)),
    "flipped": grid((60, 64, 24), (1, 1, 2.5), np.diag([-1.0, -1.0, 1.0])),
    "permuted": grid((24, 60, 64), (2.5, 1, 1), np.eye(3)[[2, 0, 1]]),
    "left-handed": grid((60, 64, 24), (1, 1, 2.5), np.diag([1.0, 1.0, -1.0])),
    "oblique": grid((60, 64, 24), (1, 1, 2.5), rotation(1)),
    "oblique-left-handed": grid((61, 63, 25), (1, 0.9, 2.5), rotation(2) @ np.diag([1.0, -1.0, 1.0])),
    "thick-slices": grid((70, 72, 14), (0.9, 0.9, 5), rotation(3)),
}
geometries = pytest.mark.parametrize("scan", GRIDS.values(), ids=GRIDS.keys())


@geometries
def test_without_resampling_the_mask_comes_back_exactly(scan):
    mask = ellipsoids(scan)
    canonical = to_canonical(mask, None, label=True)
    back = restore_mask(to_array(canonical), canonical, scan)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(mask))
    for same in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(back, same)() == getattr(scan, same)()


@geometries
def test_without_resampling_no_value_changes(scan):
    noise = sitk.AdditiveGaussianNoise(sitk.Cast(scan, sitk.sitkFloat32), 5.0, 0.0, 1)
    canonical = to_canonical(noise, None)
    np.testing.assert_array_equal(
        np.sort(to_array(canonical), axis=None), np.sort(sitk.GetArrayFromImage(noise), axis=None)
    )
    near = [side + 5e-4 for side in reversed(canonical.GetSpacing())]
    np.testing.assert_array_equal(to_array(to_canonical(noise, tuple(near))), to_array(canonical))


@geometries
@pytest.mark.parametrize(
    ("spacing", "least"),
    [((1.0, 1.0, 1.0), 0.97), ((2.5, 0.8, 0.8), 0.95)],  # thicker slices than the scan's hold less
    ids=["isotropic", "thick"],
)
def test_after_resampling_the_mask_comes_back_on_the_scans_grid(scan, spacing, least):
    mask = ellipsoids(scan)
    canonical = to_canonical(mask, spacing, label=True)
    assert canonical.GetSpacing()[::-1] == pytest.approx(spacing)
    back = restore_mask(to_array(canonical), canonical, scan)
    assert (back.GetSize(), back.GetOrigin()) == (scan.GetSize(), scan.GetOrigin())
    assert back.GetDirection() == scan.GetDirection()
    assert dice(back, mask) >= least


@geometries
def test_a_whole_body_mask_leaves_no_gap_at_the_border(scan):
    canonical = to_canonical(scan, (3.7, 3.1, 2.9), label=True)
    full = restore_mask(np.ones(to_array(canonical).shape, np.uint8), canonical, scan)
    assert sitk.GetArrayFromImage(full).all()
    bright = to_canonical(sitk.Cast(scan, sitk.sitkFloat32) + 7, (3.7, 3.1, 2.9))
    np.testing.assert_allclose(to_array(bright), 7, rtol=1e-5)


@geometries
def test_axes_run_to_superior_posterior_left(scan):
    """A ramp along each direction of the body rises along its own axis, oblique scans included."""
    for world_axis, array_axis in ((2, 0), (1, 1), (0, 2)):
        ramp = sitk.PhysicalPointSource(
            sitk.sitkVectorFloat32, scan.GetSize(), scan.GetOrigin(), scan.GetSpacing(), scan.GetDirection()
        )
        array = to_array(to_canonical(sitk.VectorIndexSelectionCast(ramp, world_axis), None))
        assert np.diff(array, axis=array_axis).mean() > 0


@pytest.mark.parametrize("name", ["oblique", "left-handed", "permuted"])
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0)], ids=["as-is", "resampled"])
def test_a_trivial_prediction_lies_on_the_nifti_input(name, spacing, tmp_path):
    """File in, threshold on the network's grid, file out: shape and affine equal, voxels where they were."""
    truth = ellipsoids(GRIDS[name])
    scan = tmp_path / "scan.nii.gz"
    sitk.WriteImage(truth, str(scan))
    original = read_volume(scan)
    canonical = to_canonical(sitk.Cast(original, sitk.sitkFloat32), spacing)
    predicted = (to_array(canonical) > 0.5).astype(np.uint8)
    write_mask(restore_mask(predicted, canonical, original), scan, tmp_path / "mask.nii.gz")
    written, source = nib.load(tmp_path / "mask.nii.gz"), nib.load(scan)
    assert written.shape == source.shape
    np.testing.assert_array_equal(written.affine, source.affine)
    got, due = np.asanyarray(written.dataobj) > 0, np.asanyarray(source.dataobj) > 0
    assert 2 * (got & due).sum() / (got.sum() + due.sum()) >= (1.0 if spacing is None else 0.97)


@pytest.mark.parametrize("slices", [(1, 1, 2.5), (1.5, 1.5, 1.5), (0.7, 0.7, 1.25)], ids=str)
def test_labels_come_closer_to_the_truth_than_by_nearest_neighbour(slices):
    coarse = ellipsoids(grid(np.round(70 / np.array(slices)), slices, rotation(1)))
    fine = to_canonical(coarse, (1.0, 1.0, 1.0), label=True)
    nearest = sitk.Resample(coarse, fine, sitk.Transform(), sitk.sitkNearestNeighbor)
    assert set(np.unique(to_array(fine))) == {0, 1, 2, 3}
    truth = ellipsoids(fine)
    assert dice(fine, truth) > dice(nearest, truth) > 0.8


def test_downsampling_does_not_alias():
    """A checkerboard too fine for the new grid becomes grey, not a coarse pattern."""
    image = sitk.GetImageFromArray((np.indices((24, 24, 24)).sum(0) % 2).astype(np.float32))
    coarse = to_array(to_canonical(image, (3.0, 3.0, 3.0)))
    np.testing.assert_allclose(coarse[1:-1, 1:-1, 1:-1], 0.5, atol=0.01)


def test_a_smooth_image_keeps_its_place_when_resampled():
    scan = grid((40, 40, 20), (1, 1, 2), rotation(1))
    points = sitk.PhysicalPointSource(
        sitk.sitkVectorFloat32, scan.GetSize(), scan.GetOrigin(), scan.GetSpacing(), scan.GetDirection()
    )
    resampled = to_canonical(sitk.VectorIndexSelectionCast(points, 0), (1.3, 1.3, 1.3))
    middle = [n // 2 for n in resampled.GetSize()]
    assert resampled[middle] == pytest.approx(resampled.TransformIndexToPhysicalPoint(middle)[0], abs=1e-2)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    mirror=st.booleans(),
    size=st.tuples(*[st.integers(1, 12)] * 3),
    side=st.tuples(*[st.floats(0.3, 6)] * 3),
    target=st.one_of(st.none(), st.tuples(*[st.floats(0.3, 6)] * 3)),
)
def test_any_grid_and_back_keeps_grid_and_constant_masks(seed, mirror, size, side, target):
    scan = grid(size, side, rotation(seed) @ np.diag([1, 1, -1 if mirror else 1]))
    canonical = to_canonical(sitk.Cast(scan, sitk.sitkFloat32) + 1, target)
    np.testing.assert_allclose(to_array(canonical), 1, rtol=1e-5)
    back = restore_mask(to_array(canonical).round().astype(np.uint8), canonical, scan)
    assert (back.GetSize(), back.GetOrigin()) == (scan.GetSize(), scan.GetOrigin())
    assert sitk.GetArrayFromImage(back).all()


def test_a_mask_of_another_shape_is_refused():
    canonical = to_canonical(GRIDS["oblique"], None)
    with pytest.raises(ShapeError, match="mask has shape"):
        restore_mask(np.zeros((2, 2, 2), np.uint8), canonical, GRIDS["oblique"])


def test_percentiles_do_not_depend_on_scale_or_offset():
    array = np.random.default_rng(0).gamma(2, size=(20, 20, 20))
    one = normalise(array, Normalisation())
    assert one.dtype == np.float32
    assert (one.min(), one.max()) == (-1, 1)
    np.testing.assert_allclose(normalise(array * 1e4 + 300, Normalisation()), one, atol=1e-3)


def test_window_is_linear_inside_and_clipped_outside():
    window = Normalisation("window", window=[-200.0, 300.0])
    np.testing.assert_allclose(
        normalise(np.array([-1000, -200, 50, 300, 3000]), window), [-1, -1, 0, 1, 1], atol=1e-6
    )


def test_zscore_has_mean_zero_and_deviation_one():
    array = normalise(np.random.default_rng(0).gamma(2, size=(20, 20, 20)) * 1e5, Normalisation("zscore"))
    assert (array.mean(), array.std()) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-4))


def test_a_small_object_in_zeros_still_has_contrast():
    array = np.zeros((50, 50, 50))
    array[25, 25, 25] = 9
    assert (normalise(array, Normalisation()).min(), normalise(array, Normalisation()).max()) == (-1, 1)


@pytest.mark.parametrize("method", ["percentile", "zscore"])
def test_an_image_of_one_value_is_refused_by_name(method, write_nifti):
    scan = write_nifti(np.full((4, 4, 4), 3.0, np.float32))
    with pytest.raises(DataError, match=r"scan\.nii\.gz: every voxel is 3"):
        load_image([scan], VolumeSettings("", "MR", LABELS, normalisation=Normalisation(method)))


@pytest.mark.parametrize(
    ("keywords", "key"),
    [
        ({"modality": "SPECT"}, "modality"),
        ({"modality": "CT"}, "normalisation.method"),
        ({"labels": {}}, "labels"),
        ({"labels": {str(n): n for n in range(1, 257)}}, "255 at most"),
        ({"labels": {"a": 1, "b": 1}}, "labels"),
        ({"labels": {"background": 0}}, "labels"),
        ({"symmetric": [["a", "nobody"]]}, "symmetric"),
        ({"channels": 0}, "channels"),
        ({"spacing": [1.0, 1.0]}, "spacing"),
        ({"spacing": [1.0, 0.0, 1.0]}, "spacing"),
        ({"patch": [0, 1, 1]}, "patch"),
        ({"foreground": 1.5}, "foreground"),
        ({"validation": -1}, "validation"),
    ],
    ids=lambda value: str(value),
)
def test_settings_that_make_no_sense_are_refused_by_key(keywords, key):
    with pytest.raises(ConfigError, match=key):
        VolumeSettings(**{"root": "", "modality": "MR", "labels": LABELS, **keywords})


@pytest.mark.parametrize(
    ("keywords", "key"),
    [
        ({"method": "max"}, "method"),
        ({"percentiles": [99.0, 1.0]}, "percentiles"),
        ({"percentiles": [1.0]}, "percentiles"),
        ({"method": "window"}, "window"),
        ({"method": "window", "window": [3.0, 3.0]}, "window"),
    ],
    ids=lambda value: str(value),
)
def test_normalisations_that_make_no_sense_are_refused_by_key(keywords, key):
    with pytest.raises(ConfigError, match=f"normalisation.{key}"):
        Normalisation(**keywords)


def test_settings_survive_omegaconf():
    from omegaconf import OmegaConf

    given = {"root": "r", "modality": "CT", "labels": LABELS, "spacing": [1, 1, 2]}
    given |= {"normalisation": {"method": "window", "window": [-100, 100]}}
    merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(VolumeSettings), given))
    assert merged.normalisation.window == [-100, 100]
    assert len(merged.label_names) == 3
