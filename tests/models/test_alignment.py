"""Strides are those that run, and what an encoder declares is held against its maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medi3d import create_encoder, create_segmenter, inflate
from medi3d.errors import ShapeError
from medi3d.models.alignment import check_strides
from medi3d.models.encoders import PlainEncoder


class Enlarged(nn.Module):
    """The finest map is enlarged by a function, by scale or to a size; then a coarser one."""

    def __init__(self, by="scale", mode="nearest"):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 4, 4), nn.Conv2d(4, 4, 2, 2)
        self.by, self.mode = by, mode

    def forward(self, x):
        a = self.a(x)
        size = [s // 2 for s in x.shape[2:]]
        to = {"scale_factor": 2.0} if self.by == "scale" else {"size": size}
        return [F.interpolate(a, mode=self.mode, **to), self.b(a)]


class Logits(nn.Module):
    """A map of stride 16 enlarged to the image's size."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 4, 4), nn.Conv2d(2, 2, 4, 4)

    def forward(self, x):
        return F.interpolate(self.b(self.a(x)), size=x.shape[2:])


class OfOneSize(nn.Module):
    """A map of 16×16 for every image."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 2, 2), nn.Conv2d(2, 2, 4, 4)

    def forward(self, x):
        a = self.a(x)
        return [F.adaptive_avg_pool2d(a, 16), self.b(a)]


class Narrowed(Enlarged):
    """Enlarged along one axis only."""

    def forward(self, x):
        a = self.a(x)
        return [F.interpolate(a, scale_factor=(1.0, 2.0)), self.b(a)]


NETWORKS = {
    "scale": lambda: Enlarged(),
    "size": lambda: Enlarged("size"),
    "bilinear": lambda: Enlarged(mode="bilinear"),
    "logits": Logits,
    "one axis": Narrowed,
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_strides_are_those_that_run(name):
    net3d = inflate(NETWORKS[name]())
    size = (32, 48, 64)
    output = net3d(torch.zeros(1, 1, *size))
    for x, stride in zip(output if isinstance(output, list) else [output], net3d.strides, strict=True):
        assert tuple(x.shape[2:]) == tuple(s // t for s, t in zip(size, stride, strict=True))


@pytest.mark.parametrize("name", ["scale", "size", "bilinear", "one axis"])
@torch.no_grad()
def test_an_impulse_is_answered_where_it_is(name):
    """With kernels that take means, over two periods of the strides: the mean of where the answers lie."""
    encoder = create_encoder(NETWORKS[name]())
    network = create_segmenter(encoder, num_classes=2, norm="batch", channels=(2, 2)).eval()
    for parameter in network.parameters():
        parameter.fill_(1 / parameter[0].numel() if parameter.dim() > 1 else 0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.weight.fill_(1)
    places = torch.stack([torch.arange(8, 24), torch.arange(8, 24).roll(5), torch.arange(8, 24).roll(11)], 1)
    axes = torch.meshgrid(*[torch.arange(32.0, dtype=torch.float64)] * 3, indexing="ij")
    shift = torch.zeros(3, dtype=torch.float64)
    for place in places:
        volume = torch.zeros(1, 1, 32, 32, 32)
        volume[0, 0, *place] = 1
        answer = network(volume)[0, 0].double()
        centre = torch.stack([(answer * axis).sum() for axis in axes]) / answer.sum()
        shift += (centre - place) / len(places)
    assert shift.abs().max() < 0.25


def test_a_map_of_one_size_is_refused():
    with pytest.raises(ShapeError, match=r"level 1 of the encoder declares the stride") as refused:
        create_segmenter(create_encoder(OfOneSize()), num_classes=2)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("axis", range(3))
def test_a_wrong_stride_is_refused_along_each_axis(axis):
    encoder = PlainEncoder(1, (2, 2))
    wrong = list(encoder.strides[1])
    wrong[axis] *= 2
    encoder.strides[1] = tuple(wrong)
    with pytest.raises(ShapeError, match="level 2"):
        create_segmenter(encoder, num_classes=2)


def test_the_wrong_number_of_strides_is_refused():
    encoder = PlainEncoder(1, (2, 2))
    encoder.strides.append((8, 8, 8))
    with pytest.raises(ShapeError, match="3 strides and returns 2 maps"):
        check_strides(encoder)


class Unpadded(nn.Module):
    """Kernels without padding: fewer positions, one for each step all the same."""

    in_channels, out_channels, strides = 1, [1, 1], [(2, 2, 2), (4, 4, 4)]

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(1, 1, 3, 2), nn.Conv3d(1, 1, 3, 2)

    def forward(self, x):
        return [self.a(x), self.b(self.a(x))]


def test_kernels_without_padding_are_taken():
    check_strides(Unpadded().train())
