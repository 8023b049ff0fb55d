"""What enlarges: exact at every depth, and the depth of the finer map is restored, odd depths too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medi3d.errors import Medi3dError
from medi3d.inflation import KernelPlan, inflate, verify
from medi3d.inflation.fold import Call
from medi3d.inflation.network import build

UP = {
    "nearest": lambda c: nn.Upsample(scale_factor=2),
    "bilinear": lambda c: nn.Upsample(scale_factor=2, mode="bilinear"),
    "aligned": lambda c: nn.UpsamplingBilinear2d(scale_factor=2),
    "bicubic": lambda c: nn.Upsample(scale_factor=2, mode="bicubic"),
    "transposed-2": lambda c: nn.ConvTranspose2d(c, c, 2, 2),
    "transposed-3": lambda c: nn.ConvTranspose2d(c, c, 3, 2, 1, output_padding=1),
    "transposed-4": lambda c: nn.ConvTranspose2d(c, c, 4, 2, 1, bias=False),
    "transposed-5": lambda c: nn.ConvTranspose2d(c, c, 5, 2, 2, output_padding=1),
    "transposed-grouped": lambda c: nn.ConvTranspose2d(c, c, 4, 2, 1, groups=2),
    "transposed-dilated": lambda c: nn.ConvTranspose2d(c, c, 3, 2, 2, output_padding=1, dilation=2),
    "sub-pixel": lambda c: nn.Sequential(nn.Conv2d(c, 4 * c, 1), nn.PixelShuffle(2)),
}


class Joined(nn.Module):
    """One step down and up again, joined with what was there: depths must meet."""

    def __init__(self, up):
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.up = up(4) if up in UP.values() else up

    def forward(self, x):
        fine = self.first(x)
        return torch.cat(
            [fine, self.up(self.down(fine)) if isinstance(self.up, nn.Module) else self.up(self, fine)], 1
        )


def restored(net, plan="isotropic", profile="mean", depths=(1, 2, 5, 8)):
    net3d = inflate(net.double(), plan, profile=profile)
    assert net3d.report.exactness.exact
    for depth in depths:
        assert verify(net, net3d, depth=depth, size=16).max_rel_error <= 1e-9
        assert net3d(torch.zeros(1, 1, depth, 16, 16, dtype=torch.float64)).shape[2] == depth
    return net3d


@pytest.mark.parametrize("name", UP)
def test_depth_is_restored_and_every_slice_is_the_2d_one(name):
    net3d = restored(Joined(UP[name]))
    assert net3d.strides == [(1, 1, 1)]
    assert net3d.deepest == (2, 2, 2)


@pytest.mark.parametrize("profile", ["centre", "factorised"])
@pytest.mark.parametrize("name", ["transposed-2", "transposed-3", "transposed-4"])
def test_transposed_kernels_take_every_exact_profile(name, profile):
    restored(Joined(UP[name]), profile=profile, depths=(5,))


@pytest.mark.parametrize(
    "plan", ["planar", KernelPlan.from_spacing((4, 1, 1)), KernelPlan("held", stride=1)], ids=str
)
@pytest.mark.parametrize("name", ["bilinear", "transposed-4", "sub-pixel"])
def test_depth_follows_the_plan(name, plan):
    net3d = restored(Joined(UP[name]), plan=plan, depths=(5,))
    assert net3d.deepest[0] == 1


def test_a_transposed_convolution_is_torch_conv_transpose3d():
    net3d, _ = build(
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 3, 4, 2, 1)).double(), KernelPlan.isotropic()
    )
    first, layer = net3d.network
    layer.weight.data.normal_()
    layer.passages = [(1.0, 2, 1)]  # as behind a step
    volume = torch.randn(2, 2, 6, 5, 7, dtype=torch.float64)
    x = F.conv3d(volume, first.weight, first.bias)
    x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
    expected = F.conv_transpose3d(x, layer.weight, layer.bias, 2, 1)[:, :, 2:-2]
    slices = F.conv3d(volume, first.weight, first.bias).transpose(1, 2).flatten(0, 1)
    with net3d.fold.running(Call(batch=2, height=5, depth=12)):  # of which six slices are left
        found = layer(slices)
    found = found.unflatten(0, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(found, expected)


FUNCTIONS = {
    "max": lambda s, x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2),
    "mean": lambda s, x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear"),
    "norm": lambda s, x: F.interpolate(
        F.lp_pool2d(x, 2.0, 2), size=x.shape[2:], mode="bicubic", align_corners=True
    ),
    "conv": lambda s, x: F.interpolate(
        F.conv2d(x, s.down.weight.new_ones(4, 4, 3, 3), stride=2, padding=1), size=x.shape[2:]
    ),
    "transposed": lambda s, x: F.conv_transpose2d(
        F.avg_pool2d(x, 2), s.first.bias.new_ones(4, 4, 2, 2), stride=2
    ),
    "sub-pixel": lambda s, x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "reduced": lambda s, x: F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), size=x.shape[2:]),
    "unpooled": lambda s, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "pyramid": lambda s, x: F.interpolate(F.adaptive_avg_pool2d(x, 3), size=x.shape[2:], mode="bilinear"),
    "keyword": lambda s, x: F.interpolate(input=F.max_pool2d(input=x, kernel_size=2), scale_factor=2.0),
    "enlarged pool": lambda s, x: F.interpolate(F.adaptive_avg_pool2d(x, 150), size=x.shape[2:]),
    "twice": lambda s, x: F.interpolate(F.max_pool2d(F.max_pool2d(x, 2), 2), scale_factor=4),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_paced_like_layers(name):
    net3d = restored(Joined(FUNCTIONS[name]))
    assert net3d.deepest[0] == {"pyramid": 1, "enlarged pool": 1, "twice": 4}.get(name, 2)


def test_a_layer_that_enlarges_at_two_resolutions_restores_both():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, 4, 3, s, 1) for i, s in ((1, 1), (4, 2), (4, 2)))
            self.up = nn.Upsample(scale_factor=2)

        def forward(self, x):
            a = self.a(x)
            b = self.b(a)
            return a + self.up(b + self.up(self.c(b)))

    restored(Shared(), depths=(2, 3, 7, 8))


def test_places_of_maxima_lead_back():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.pool, self.back = (
                nn.Conv2d(1, 2, 1),
                nn.MaxPool2d(2, return_indices=True),
                nn.MaxUnpool2d(2),
            )

        def forward(self, x):
            return self.back(*self.pool(self.a(x)))

    net3d = restored(Places())
    volume = torch.randn(1, 1, 4, 8, 8, dtype=torch.float64)
    filled = net3d(volume)
    assert int((filled != 0).sum()) == 2 * 4 * 16  # one place of four in each slice


def test_a_gate_of_a_coarser_map_is_repeated_for_the_finer():
    class Gated(Joined):
        def forward(self, x):
            fine = F.max_pool2d(self.first(x), 2)
            return fine * self.down(fine).mean((2, 3), keepdim=True).sigmoid()

    assert inflate(Gated(UP["nearest"])).report.exactness.exact


def test_functions_inside_and_around_layers_are_told_apart():
    """A pool as a layer, in a block that pools as a function, in a network that does too."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1)

        def forward(self, x):
            return F.max_pool2d(self.pool(self.conv(x)), 2)

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(1, 4, 1), nn.ModuleList([Block(), Block()])

        def forward(self, x):
            maps = [F.max_pool2d(self.stem(x), 2)]
            for block in self.blocks:
                maps.append(block(maps[-1]))
            return maps

    net3d = inflate(Around())
    assert net3d.strides == [(2, 2, 2), (4, 4, 4), (8, 8, 8)]
    rows = {layer.name: layer.stride_3d for layer in net3d.report.layers}
    assert rows["max_pool2d"] == rows["blocks.1.max_pool2d"] == (2, 2, 2)
    assert rows["blocks.1.pool"] == (1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bilinear", "transposed-4"])
def test_it_compiles(name):
    net3d = inflate(Joined(UP[name])).eval()
    volume = torch.randn(1, 1, 5, 16, 16)
    torch.testing.assert_close(torch.compile(net3d)(volume), net3d(volume))


@pytest.mark.slow
@torch.no_grad()
def test_functions_compile():
    net3d = inflate(Joined(FUNCTIONS["mean"])).eval()
    volume = torch.randn(1, 1, 5, 16, 16)
    torch.testing.assert_close(torch.compile(net3d)(volume), net3d(volume))


def test_depths_that_never_meet_are_refused():
    class Apart(Joined):
        def forward(self, x):
            fine = self.first(x)
            return fine + self.down(fine).repeat_interleave(2, 2).repeat_interleave(2, 3)

    with pytest.raises(Medi3dError, match="cannot be inflated exactly"):
        inflate(Apart(UP["nearest"]))
