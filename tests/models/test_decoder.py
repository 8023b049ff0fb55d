"""The U-Net decoder: any size, any strides that grow, thick slices held apart."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medi3d.errors import ShapeError
from medi3d.models.decoder import Decoder, SubpixelHead, default_channels, fit
from medi3d.models.networks import create_segmenter

STRIDES = {
    "halves": [(2, 2, 2), (4, 4, 4), (8, 8, 8)],
    "thick slices": [(1, 2, 2), (1, 4, 4), (2, 8, 8)],
    "planar": [(1, 2, 2), (1, 4, 4)],
    "full resolution first": [(1, 1, 1), (2, 2, 2), (4, 4, 4)],
    "coarse first": [(4, 4, 4), (8, 8, 8)],
    "one level": [(2, 2, 2)],
    "by three": [(3, 3, 3), (6, 6, 6)],
    "rests": [(1, 2, 2), (1, 2, 2), (2, 4, 4)],
}


class Sampling(nn.Module):
    """An encoder without any work: every stride-th voxel, with or without a last stride that is not full."""

    def __init__(self, strides, drops_ends=False, in_channels=1):
        super().__init__()
        self.strides, self.in_channels, self.drops_ends = strides, in_channels, drops_ends
        self.out_channels = [4] * len(strides)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        if x.shape[1] != self.in_channels:
            raise ShapeError("other channels")
        maps = []
        for d, h, w in self.strides:
            y = x[:, :1, d - 1 :: d, h - 1 :: h, w - 1 :: w] if self.drops_ends else x[:, :1, ::d, ::h, ::w]
            maps.append(self.scale * y.expand(-1, 4, -1, -1, -1))
        return maps


SEGMENTERS = {
    (name, drops): create_segmenter(Sampling(strides, drops), num_classes=2, channels=widths)
    for name, strides in STRIDES.items()
    for widths in [[4] * (len(strides) - (strides[0] == (1, 1, 1)))]
    for drops in (False, True)
}
SIZES = st.tuples(*[st.integers(5, 40)] * 3)


@pytest.mark.parametrize("drops_ends", [False, True], ids=["rounds up", "rounds down"])
@pytest.mark.parametrize("strides", STRIDES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(size=SIZES, training=st.booleans())
@torch.no_grad()
def test_answer_has_the_size_of_the_input(strides, drops_ends, size, training):
    net = SEGMENTERS[strides, drops_ends].train(training)
    assert net(torch.randn(1, 1, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize("size", [(35, 50, 36), (5, 5, 5), (1, 1, 1), (1, 40, 40), (40, 5, 8)], ids=str)
@pytest.mark.parametrize("strides", STRIDES)
@torch.no_grad()
def test_crops_of_the_hippocampus_and_tiny_volumes_pass(strides, size):
    assert SEGMENTERS[strides, False](torch.randn(1, 1, *size)).shape == (1, 2, *size)


def test_levels_get_coarser_by_the_encoders_strides():
    decoder = Decoder(1, [4, 4, 4], STRIDES["thick slices"], channels=[4, 5, 6], norm="batch").eval()
    volume = torch.randn(2, 1, 6, 16, 24)
    maps = decoder(volume, Sampling(STRIDES["thick slices"])(volume))
    assert [tuple(x.shape) for x in maps] == [(2, 4, 6, 16, 24), (2, 5, 6, 8, 12), (2, 6, 6, 4, 6)]
    assert decoder.out_channels == [4, 5, 6]


def test_slices_stay_apart_where_the_encoder_keeps_them_apart():
    """Planar encoder, no statistics over depth: slices in another order give answers in that order."""
    net = create_segmenter(Sampling(STRIDES["planar"]), num_classes=2, norm="batch").eval()
    volume, order = torch.randn(1, 1, 5, 16, 16), torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(net(volume[:, :, order]), net(volume)[:, :, order])


def test_depth_is_mixed_where_voxels_are_cubes_again():
    """Strides (1, 4, 4) to (2, 8, 8): flat kernels above, cubes would come below."""
    kernels = [block.conv1.conv.weight.shape[2] for block in decoder_of("thick slices").join]
    assert kernels == [1, 1, 1]
    assert [block.conv1.conv.weight.shape[2] for block in decoder_of("halves").join] == [3, 3, 3]


def decoder_of(name):
    return Decoder(1, [4] * len(STRIDES[name]), STRIDES[name])


@pytest.mark.parametrize(
    ("strides", "channels"),
    [("halves", [16, 32, 64]), ("full resolution first", [16, 32]), ("thick slices", [16, 32, 64])],
)
def test_channels_by_default(strides, channels):
    assert decoder_of(strides).out_channels == channels


def test_channels_stop_growing():
    assert default_channels([(2**i,) * 3 for i in range(8)]) == [16, 32, 64, 96, 128, 128, 128]


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_every_norm_is_built(norm):
    net = create_segmenter(Sampling(STRIDES["halves"]), num_classes=3, norm=norm)
    assert net(torch.randn(2, 1, 9, 10, 11)).shape == (2, 3, 9, 10, 11)


@pytest.mark.parametrize(
    "strides",
    [[(4, 4, 4), (2, 2, 2)], [(2, 2, 2), (3, 3, 3)], [(2, 2, 2), (1, 4, 4)]],
    ids=["shrink", "no whole factor", "depth comes back"],
)
def test_strides_that_do_not_grow_are_refused(strides):
    with pytest.raises(ShapeError, match="strides must grow by whole factors"):
        Decoder(1, [4] * 2, strides)


@pytest.mark.parametrize("channels", [[4], [4, 4, 4, 4]], ids=["few", "many"])
def test_a_wrong_number_of_channels_is_refused(channels):
    with pytest.raises(ShapeError, match=r"has 3 levels .* but . channel numbers"):
        Decoder(1, [4] * 3, STRIDES["halves"], channels=channels)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 3, 3])],
    ids=["crop", "keep", "repeat"],
)
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_fit_changes_the_far_end_only(axis, size, expected):
    shape, wanted = [1, 1, 2, 2, 2], [2, 2, 2]
    shape[axis], wanted[axis - 2] = 4, size
    ramp = torch.arange(4.0).view([4 if a == axis else 1 for a in range(5)]).expand(shape)
    out = fit(ramp, wanted)
    assert list(out.shape[2:]) == wanted
    assert out.movedim(axis, 0).flatten(1)[:, 0].tolist() == expected


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (4, 4, 4)], ids=str)
def test_a_subpixel_head_lays_out_voxels_as_a_transposed_convolution(stride):
    head = SubpixelHead(5, 3, stride)
    torch.nn.init.normal_(head.convolution.weight)
    x = torch.randn(2, 5, 2, 3, 4)
    weight = head.convolution.weight.view(3, *stride, 5).movedim(-1, 0)  # (channels, classes, D, H, W)
    bias = head.convolution.bias.view(3, *stride).repeat(1, *x.shape[2:])
    torch.testing.assert_close(head(x), F.conv_transpose3d(x, weight, stride=stride) + bias)


def test_a_subpixel_head_starts_alike_for_all_voxels_of_a_position():
    logits = SubpixelHead(5, 3, (2, 2, 2))(torch.randn(1, 5, 2, 2, 2))
    torch.testing.assert_close(logits, F.interpolate(logits[..., ::2, ::2, ::2], scale_factor=2))


def test_one_resolution_is_refused():
    with pytest.raises(ShapeError, match="two resolutions"):
        Decoder(1, [8], [(2, 2, 2)], full_resolution=False)
