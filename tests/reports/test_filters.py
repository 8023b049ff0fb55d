"""Pictures of filters show each filter, in its own scale and with its time from left to right."""

import numpy as np
import pytest
import torch

from medi3d.reports.filters import GAP, LINE, mosaic, plot_filters_over_time


def test_time_runs_from_left_to_right_and_channels_are_colours():
    kernel = torch.zeros(1, 3, 2, 5, 5)
    kernel[0, 0, 1] = 2.0  # red, at the second time only
    picture = mosaic(kernel)
    assert picture.shape == (5 + LINE, 4 * (2 * (5 + LINE) + GAP), 3)
    assert (picture[:5, :5] == 0).all()
    assert (picture[:5, 6:11] == [1, 0, 0]).all()


def test_each_filter_has_its_own_scale():
    pattern = torch.rand(1, 1, 3, 7, 7)
    one, other = np.split(mosaic(torch.cat([pattern, 100 * pattern - 3])), 4, axis=1)[:2]
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.figures
def test_sixty_four_filters_before_and_after_are_one_picture(tmp_path):
    kernel = torch.randn(80, 3, 7, 7, 7)
    assert mosaic(kernel).shape[0] == 16 * (7 + LINE)
    assert plot_filters_over_time(kernel, kernel, tmp_path / "filters.png").stat().st_size > 1000
