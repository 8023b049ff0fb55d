"""The law of inflation: a profile that sums to one keeps the answer on boring volumes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medi3d.errors import PlanError, ShapeError
from medi3d.inflation.kernels import (
    adapt_channels,
    collapse_kernel,
    depth_profile,
    inflate_kernel,
    resize_depth,
)

EXACT = ("mean", "centre")


@given(taps=st.integers(1, 11), profile=st.sampled_from(EXACT))
def test_profiles_sum_to_one(taps, profile):
    assert depth_profile(taps, profile).sum().item() == pytest.approx(1, abs=1e-15)


@given(taps=st.integers(1, 9), profile=st.sampled_from(EXACT), seed=st.integers(0, 1000))
def test_taps_sum_to_the_2d_kernel_to_the_last_bit(taps, profile, seed):
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    kernel = inflate_kernel(weight, taps, profile)
    assert kernel.shape == (4, 3, taps, 3, 3)
    assert torch.equal(kernel.double().sum(dim=2), weight.double())


@pytest.mark.parametrize("profile", EXACT)
def test_collapse_undoes_inflation(profile):
    weight = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(collapse_kernel(inflate_kernel(weight, 7, profile)), weight)


def test_one_tap_is_the_kernel_itself():
    weight = torch.randn(2, 2, 3, 3)
    for profile in (*EXACT, "repeat"):
        assert torch.equal(inflate_kernel(weight, 1, profile)[:, :, 0], weight)


def test_repeat_answers_n_times_too_large():
    weight = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(inflate_kernel(weight, 3, "repeat").sum(2), 3 * weight)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
def test_grey_image_gives_the_same_with_any_number_of_channels(channels):
    weight, grey = torch.randn(8, 3, 3, 3, dtype=torch.float64), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    expected = torch.conv2d(grey.expand(-1, 3, -1, -1), weight)
    found = torch.conv2d(grey.expand(-1, channels, -1, -1), adapt_channels(weight, channels))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_refusals():
    with pytest.raises(ShapeError, match=r"\(O, I, kH, kW\), not \(2, 2, 3\)"):
        inflate_kernel(torch.zeros(2, 2, 3), 3)
    with pytest.raises(PlanError, match="at least 1 tap"):
        inflate_kernel(torch.zeros(2, 2, 3, 3), 0)
    with pytest.raises(PlanError, match="unknown depth profile 'median': use one of mean"):
        depth_profile(3, "median")
    with pytest.raises(ShapeError, match="at least 1 input channel, not 0"):
        adapt_channels(torch.zeros(2, 3, 3, 3), 0)


@pytest.mark.parametrize(("have", "taps"), [(3, 5), (5, 3), (7, 3), (1, 3), (3, 1), (2, 7), (4, 4)], ids=str)
def test_resized_kernel_answers_the_same_on_volumes_constant_along_depth(have, taps):
    weight = torch.randn(4, 3, have, 3, 3)
    resized = resize_depth(weight, taps)
    assert resized.shape == (4, 3, taps, 3, 3)
    torch.testing.assert_close(resized.sum(2), weight.sum(2))


@given(have=st.integers(1, 7), more=st.integers(0, 7))
def test_fewer_taps_undo_more_taps(have, more):
    weight = torch.randn(2, 2, have, 3, 3, dtype=torch.float64)
    back = resize_depth(resize_depth(weight, have + more), have)
    torch.testing.assert_close(back, weight, rtol=0, atol=1e-12)


def test_resizing_from_one_tap_is_the_mean_profile_and_to_one_tap_the_sum():
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(resize_depth(weight.unsqueeze(2), 5), inflate_kernel(weight, 5))
    deep = torch.randn(4, 3, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(resize_depth(deep, 1)[:, :, 0], collapse_kernel(deep))


def test_resizing_keeps_a_kernel_symmetric_and_refuses_what_is_none():
    weight = torch.randn(1, 1, 3, 1, 1, dtype=torch.float64)
    mirrored = resize_depth(weight.flip(2), 7)
    torch.testing.assert_close(mirrored, resize_depth(weight, 7).flip(2))
    with pytest.raises(ShapeError, match=r"\(O, I, kD, kH, kW\), not \(2, 3, 3, 3\)"):
        resize_depth(torch.zeros(2, 3, 3, 3), 3)
    with pytest.raises(PlanError, match="at least 1 tap"):
        resize_depth(weight, 0)


@pytest.mark.parametrize("profile", ["factorised", "acs"])
def test_profiles_that_keep_kernels_2d_have_no_row_of_taps(profile):
    with pytest.raises(PlanError, match=f"profile '{profile}' keeps kernels 2D"):
        inflate_kernel(torch.zeros(2, 2, 3, 3), 3, profile)
