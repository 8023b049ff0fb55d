"""What pretraining takes away: exactly where and as much as it says, and nothing else."""

import pytest
import torch

from medi3d.datasets.sampling.corruption import (
    bend_intensities,
    mask_cubes,
    paint_in,
    paint_out,
    shuffle_locally,
)


@pytest.fixture
def image():
    return torch.rand(2, 24, 30, 20) * 2 - 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_masked_cubes(image, share):
    masked, mask = mask_cubes(image, 5, share)
    hidden = mask.bool().expand_as(image)
    assert mask.shape == (1, 24, 30, 20)
    assert torch.equal(masked[~hidden], image[~hidden])
    mean = image.mean(dim=(1, 2, 3), keepdim=True).expand_as(image)
    assert torch.equal(masked[hidden], mean[hidden])
    assert 0 < mask.mean() < 1
    assert abs(mask.mean() - share) < 0.15


def test_masked_cubes_lie_on_a_grid():
    _, mask = mask_cubes(torch.rand(1, 16, 16, 16), 4, 0.5)
    for axis in (1, 2, 3):
        others = [other for other in (0, 1, 2, 3) if other != axis]
        changes = (mask.diff(dim=axis) != 0).any(dim=others[0], keepdim=True)
        places = changes.nonzero()[:, axis]
        assert len({int(place) % 4 for place in places}) == 1


def test_shuffling_keeps_every_value_near_its_place(image):
    shuffled = shuffle_locally(image)
    assert not torch.equal(shuffled, image)
    assert torch.equal(shuffled.flatten(1).sort().values, image.flatten(1).sort().values)
    ramp = torch.arange(24.0)[:, None, None].expand(24, 30, 20)[None]
    assert (shuffle_locally(ramp) - ramp).abs().max() <= 2 * (24 // 10 - 1)
    both = shuffle_locally(image[:1].repeat(2, 1, 1, 1))
    assert torch.equal(both[0], both[1])  # the channels of a voxel stay together


def test_bent_intensities_stay_in_range_and_equal_ones_stay_equal(image):
    for _ in range(8):
        bent = bend_intensities(image)
        assert (bent.abs() <= 1).all()
        assert bent.dtype == image.dtype
        assert len(bend_intensities(torch.tensor([-1.0, 1.0]).repeat(1, 1, 1, 3)).unique()) <= 2


@pytest.mark.parametrize(("paint", "least", "most"), [(paint_in, 0.0, 0.2), (paint_out, 0.1, 0.95)])
def test_painting_covers_blocks_with_noise(paint, least, most):
    image = torch.full((1, 32, 48, 32), 7.0)
    shares = []
    for _ in range(10):
        painted = paint(image)
        noise = painted != 7
        assert (painted[noise].abs() <= 1).all()
        shares.append(float(noise.float().mean()))
    assert least <= min(shares)
    assert 0 < max(shares) <= most
    assert image.unique().tolist() == [7.0]


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 9, 30)])
def test_any_size_will_do(size):
    image = torch.rand(1, *size)
    for change in (shuffle_locally, bend_intensities, paint_in, paint_out):
        assert change(image).shape == image.shape
