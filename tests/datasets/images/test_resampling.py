"""Linear between parallel grids: equal to ITK, slab by slab as at once, the strongest label wins."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medi3d.datasets.images.resampling import (
    interpolate,
    oriented_grid,
    resample_labels,
    restored_slabs,
    taps_between,
    turned_like,
)
from tests.datasets.images.test_files import rotation


def grid(size, spacing, origin=(0, 0, 0), axes=None):
    image = sitk.Image(size, sitk.sitkFloat32)
    image.SetSpacing(spacing)
    image.SetDirection((np.eye(3) if axes is None else axes).ravel().tolist())
    image.SetOrigin(origin)
    return image


SOURCE = grid((11, 9, 7), (1.0, 1.5, 2.0), (3, 2, 1), rotation(1))
TARGETS = {
    "finer": grid((15, 18, 20), (0.6, 0.6, 0.6), (3, 2, 1), rotation(1)),
    "coarser": grid((4, 3, 3), (2.5, 3.0, 4.0), (4, 3, 2), rotation(1)),
    "same": SOURCE,
}
targets = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())


def noise(channels):
    return torch.randn(channels, *SOURCE.GetSize()[::-1])


def by_itk(values, target):
    image = sitk.GetImageFromArray(values.numpy())
    image.CopyInformation(SOURCE)
    inside = sitk.Resample(image * 0 + 1, target, sitk.Transform(), sitk.sitkLinear, 0.0)
    resampled = sitk.Resample(image, target, sitk.Transform(), sitk.sitkLinear)
    return sitk.GetArrayFromImage(resampled), sitk.GetArrayFromImage(inside) == 1


@targets
def test_interpolation_agrees_with_itk(target):
    values = noise(1)[0]
    expected, inside = by_itk(values, target)
    ours = interpolate(values, taps_between(SOURCE, target)).numpy()
    assert inside.sum() > 20
    np.testing.assert_allclose(ours[inside], expected[inside], atol=1e-4)


@targets
@pytest.mark.parametrize("cuts", [(7,), (1, 1, 1, 1, 1, 1, 1), (3, 4)], ids=len)
@pytest.mark.parametrize("held", [1, 2**26], ids=["slice by slice", "at once"])
def test_slabs_give_what_the_whole_gives(target, cuts, held, monkeypatch):
    monkeypatch.setattr("medi3d.datasets.images.resampling.SLAB_BYTES", held)
    values = noise(3)
    whole = interpolate(values, taps_between(SOURCE, target))
    slabs = torch.cat(list(restored_slabs(values.split(cuts, dim=1), SOURCE, target)), dim=1)
    torch.testing.assert_close(slabs, whole)


@targets
@pytest.mark.parametrize("at_once", [1, 2**24], ids=["slice by slice", "at once"])
def test_the_strongest_indicator_wins(target, at_once, monkeypatch):
    monkeypatch.setattr("medi3d.datasets.images.resampling.LABEL_VOXELS", at_once)
    labels = torch.randint(0, 4, SOURCE.GetSize()[::-1])
    image = sitk.GetImageFromArray((labels * 100).numpy().astype(np.uint16))
    image.CopyInformation(SOURCE)
    shares = [interpolate((labels == k).float(), taps_between(SOURCE, target)) for k in range(4)]
    ours = sitk.GetArrayFromImage(resample_labels(image, target)).astype(int)
    share = torch.stack(shares).gather(0, torch.from_numpy(ours // 100)[None])[0]
    torch.testing.assert_close(share, torch.stack(shares).amax(0))


@pytest.mark.parametrize("value", [0, 7, 60000])
def test_a_map_of_one_value_stays_so(value):
    image = sitk.Image(SOURCE.GetSize(), sitk.sitkUInt16) + value
    image.CopyInformation(SOURCE)
    for target in TARGETS.values():
        assert (sitk.GetArrayFromImage(resample_labels(image, target)) == value).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_mask_is_turned_back_as_it_was(seed):
    axes = np.eye(3)[np.random.default_rng(seed).permutation(3)] @ np.diag([1, -1, 1]) if seed else None
    if seed == 7:  # exactly between two axes
        axes = np.array([[0.5, -0.5, 0], [0.5, 0.5, 0], [0, 0, 0.5**0.5]]) * 2**0.5
    original = grid((3, 4, 5), (1, 2, 3), (7, 8, 9), axes)
    values = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    image = sitk.GetImageFromArray(values)
    image.CopyInformation(original)
    turned = turned_like(sitk.DICOMOrient(image, "LPS"), original)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(turned), values)
    assert turned.GetDirection() == original.GetDirection()
    assert oriented_grid(original).GetSize() == sitk.DICOMOrient(image, "LPS").GetSize()


@pytest.mark.parametrize("kind", [sitk.sitkUInt8, sitk.sitkUInt16, sitk.sitkInt32], ids=["u1", "u2", "i4"])
@pytest.mark.parametrize("lowest", [0, 3], ids=["background", "none"])
def test_labels_are_the_same_in_every_type(kind, lowest):
    values = np.random.default_rng(0).integers(lowest, 200, (5, 6, 7))
    image = sitk.GetImageFromArray(values)
    grid = sitk.Image([9, 8, 7], sitk.sitkUInt8)
    grid.SetSpacing([0.75, 0.7, 0.65])
    expected = sitk.GetArrayFromImage(resample_labels(image, grid))
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(resample_labels(sitk.Cast(image, kind), grid)), expected
    )
