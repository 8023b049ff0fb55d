"""A mask is brought to the voxels of its image exactly, or refused."""

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from medi3d.datasets.images.lattice import on_grid_of
from medi3d.errors import DataError

SHAPE = (5, 6, 7)  # x, y, z
VALUES = np.random.default_rng(0).integers(0, 2036, SHAPE).astype(np.int32)


def image_of(values: np.ndarray, angle: float = 0.0) -> sitk.Image:
    """(X, Y, Z) values, voxels of 0.8 x 1.2 x 3 mm, turned about an oblique axis."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    image.SetSpacing((0.8, 1.2, 3.0))
    turn = sitk.VersorTransform((1.0, 2.0, 0.5), angle)
    image.SetDirection(turn.GetMatrix())
    image.SetOrigin((-31.0, 17.0, 40.0))
    return image


def values_of(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image).T


@given(
    st.permutations((0, 1, 2)),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.floats(0, 3.1),
)
def test_axes_in_another_order_or_sign_at_any_angle(order, flips, angle):
    image = image_of(VALUES, angle)
    turned = sitk.Flip(sitk.PermuteAxes(image, order), flips)
    turned.SetOrigin([place + 1e-4 for place in turned.GetOrigin()])  # as headers round
    back = on_grid_of(turned, image)
    np.testing.assert_array_equal(values_of(back), VALUES)
    assert (back.GetOrigin(), back.GetDirection()) == (image.GetOrigin(), image.GetDirection())


@pytest.mark.parametrize("angle", [0.0, np.pi / 4], ids=["straight", "45 degrees"])
def test_what_a_cropped_or_padded_mask_lacks_is_background(angle):
    image = image_of(VALUES, angle)
    expected = np.zeros_like(VALUES)
    expected[1:4, 2:, :5] = VALUES[1:4, 2:, :5]
    cropped = sitk.Flip(image[1:4, 2:, :5], (False, True, False))
    np.testing.assert_array_equal(values_of(on_grid_of(cropped, image)), expected)
    padded = sitk.ConstantPad(image, (2, 0, 1), (0, 3, 1))
    np.testing.assert_array_equal(values_of(on_grid_of(padded, image)), VALUES)


def test_slices_along_one_axis_are_missed_unless_the_file_says_that_it_is_cropped():
    image = image_of(VALUES)
    with pytest.raises(DataError, match="are slices missing"):
        on_grid_of(image[:, :, 1:], image)
    brought = values_of(on_grid_of(image[:, :, 1:], image, cropped=True))
    np.testing.assert_array_equal(brought[..., 1:], VALUES[..., 1:])
    assert not brought[..., 0].any()


def shifted(image: sitk.Image, steps: float) -> sitk.Image:
    moved = sitk.Image(image)
    moved.SetOrigin(image.TransformContinuousIndexToPhysicalPoint((steps, 0.0, 0.0)))
    return moved


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: shifted(image, 1.0), "header was lost"),
        (lambda image: shifted(image, 0.3), "apart"),
        (lambda image: shifted(image[:3, :3], -1.0), "labelled voxels lie outside"),
        (lambda image: image_of(VALUES, 0.02), "apart"),
    ],
    ids=["whole voxel", "part of a voxel", "outside", "turned"],
)
def test_other_places_are_refused(change, words):
    image = image_of(VALUES)
    with pytest.raises(DataError, match=words):
        on_grid_of(change(image), image)
