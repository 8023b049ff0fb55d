"""Which image sizes a network takes is found without computing, and volumes are brought to them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medi3d.errors import ShapeError
from medi3d.inflation.image_sizes import ImageSizes, dry_run, find_sizes
from medi3d.inflation.network import inflate


class Positions(nn.Module):
    """Patches of 8 pixels with embeddings of their positions in an image of 48 pixels."""

    def __init__(self):
        super().__init__()
        self.img_size = (48, 48)
        self.patches = nn.Conv2d(3, 4, 8, 8)
        self.positions = nn.Parameter(torch.randn(1, 4, 6, 6))

    def forward(self, image):
        return [self.patches(image) + self.positions]


class Scaling(nn.Module):
    """Scales every image to 48 pixels first."""

    def __init__(self):
        super().__init__()
        self.img_size = 48
        self.conv = nn.Conv2d(3, 4, 3, 4, 1)

    def forward(self, image):
        return [self.conv(F.interpolate(image, (48, 48)))]


class Meeting(nn.Module):
    """A branch that goes down by 4 and up again meets one that stays: any size that 4 divides."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 4, 4)
        self.up = nn.Upsample(scale_factor=4)

    def forward(self, image):
        x = self.stem(image)
        return [x + self.up(self.down(x))]


class Hungry(nn.Sequential):
    """Padless convolutions, which need 43 pixels."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 2, 15, 2), nn.Conv2d(2, 2, 15))


@pytest.mark.parametrize(
    ("net", "sizes"),
    [
        (nn.Conv2d(3, 4, 3, 2, 1), ImageSizes(1, 8)),
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3, 1, 1)), ImageSizes(2, 8)),
        (Meeting(), ImageSizes(4, 8)),
        (Hungry(), ImageSizes(1, 48)),
        (Positions(), ImageSizes(only=48)),
        (Scaling(), ImageSizes(only=48)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(16)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(9, 2)), None),
    ],
    ids=["any", "unshuffled", "meeting", "hungry", "positions", "scaling", "pooled", "none"],
)
def test_sizes_are_found(net, sizes):
    assert find_sizes(net) == sizes


@pytest.mark.parametrize(
    ("sizes", "given", "fitted"),
    [
        (ImageSizes(), (5, 31, 33), [5, 31, 33]),
        (ImageSizes(32, 32, depth_multiple=8), (5, 31, 33), [8, 32, 64]),
        (ImageSizes(1, 80), (5, 31, 96), [5, 80, 96]),
        (ImageSizes(only=48), (5, 31, 48), [5, 48, 48]),
    ],
    ids=["any", "multiple", "least", "only"],
)
def test_a_volume_is_padded_to_what_fits(sizes, given, fitted):
    assert sizes.fit(given) == fitted
    volume = torch.randn(1, 1, *given)
    padded = sizes.pad(volume)
    assert list(padded.shape[2:]) == fitted
    assert torch.equal(padded[:, :, : given[0], : given[1], : given[2]], volume)
    assert torch.equal(padded[..., -1, -1, -1], volume[..., -1, -1, -1])


def test_what_is_too_large_is_refused_with_the_size_that_would_do():
    with pytest.raises(ShapeError, match=r"up to 48×48.*not 40×64: build it with size=64$"):
        ImageSizes(only=48).fit((5, 40, 64))


@torch.no_grad()
def test_maps_of_a_padded_volume_are_those_of_the_whole_and_cropped():
    encoder = inflate(Positions(), in_channels=1).eval()
    encoder.fit_to(find_sizes(Positions()))
    volume = torch.randn(1, 1, 16, 33, 24)
    found = encoder(volume)[0]
    assert found.shape == (1, 4, 2, 5, 3)
    whole = encoder(encoder.sizes.pad(volume))[0]
    assert torch.equal(found, whole[:, :, :, :5, :3])


def test_depth_is_padded_in_no_network_whose_enlargements_restore_it():
    encoder = inflate(Meeting(), in_channels=1)
    encoder.fit_to(find_sizes(Meeting()))
    assert (encoder.sizes.multiple, encoder.sizes.depth_multiple) == (4, 1)
    assert encoder(torch.randn(1, 1, 7, 10, 9))[0].shape == (1, 4, 7, 10, 9)


def test_a_dry_run_tells_shapes_and_changes_nothing():
    encoder = inflate(Meeting(), in_channels=1)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert dry_run(encoder, (8, 4000, 4000)) == [torch.Size([1, 4, 8, 4000, 4000])]
    assert dry_run(encoder, (8, 7, 7)) is None
    assert encoder.training
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
