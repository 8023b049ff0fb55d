"""The dry run: which layers ran, in which order, and at which resolution; the network stays as it was."""

import pytest
import torch
from torch import nn

from medi3d.errors import SourceError
from medi3d.inflation.tracing import IMAGE_SIZES, trace


class Backwards(nn.Module):
    """Layers declared in another order than they run; one runs twice, one never."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(4, 4, 3, 2, 1, dilation=2)
        self.unused = nn.Conv2d(4, 4, 7)
        self.twice = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.stem = nn.Conv2d(1, 4, 7, 2, 3)
        self.side = nn.Conv2d(1, 4, 1, 4)

    def forward(self, image):
        x = self.twice(self.twice(self.pool(self.norm(self.stem(image)))))
        return self.last(x + self.side(image))


SMALL = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 94 * 94, 3))


@pytest.fixture(scope="module")
def seen():
    return trace(reordered(Backwards()))


def reordered(net):
    """The stem first among the modules: the first convolution tells how many channels an image has."""
    stem = net._modules.pop("stem")
    net._modules = {"stem": stem, **net._modules}
    return net


def test_layers_come_in_the_order_in_which_they_first_ran(seen):
    assert list(seen.layers) == ["stem", "pool", "twice", "side", "last"]


def test_geometry_is_the_layers(seen):
    stem, last = seen.layers["stem"], seen.layers["last"]
    assert (stem.kind, stem.kernel, stem.stride, stem.dilation) == ("conv", (7, 7), (2, 2), (1, 1))
    assert (last.kind, last.kernel, last.stride, last.dilation) == ("conv", (3, 3), (2, 2), (2, 2))
    assert seen.layers["twice"].kernel == (1, 3)


def test_scale_is_that_of_what_the_layer_reads(seen):
    scales = {path: geometry.in_plane_stride for path, geometry in seen.layers.items()}
    assert scales == {"stem": 1, "pool": 2, "twice": 4, "side": 1, "last": 4}


def test_kinds_are_counted_apart(seen):
    ordinals = {path: (geometry.kind, geometry.ordinal) for path, geometry in seen.layers.items()}
    assert ordinals["pool"] == ("max_pool", 0)
    assert [ordinals[p][1] for p in ("stem", "twice", "side", "last")] == [0, 1, 2, 3]


def test_stems_are_the_convolutions_that_read_the_image(seen):
    assert seen.stems == {"stem", "side"}


def test_where_the_image_is_changed_first_the_first_convolution_is_the_stem():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)

        def forward(self, x):
            return self.second(self.first(2 * x - 1))

    assert trace(Scaled()).stems == {"first"}


@pytest.mark.parametrize("training", [True, False])
def test_the_network_stays_as_it_was(training):
    net = reordered(Backwards()).train(training)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    trace(net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(module.training is training for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_the_smallest_size_that_the_network_takes_is_used():
    assert trace(nn.Conv2d(3, 1, 3)).size == (IMAGE_SIZES[0], IMAGE_SIZES[0])
    assert trace(SMALL).size == (96, 96)


def test_items_of_a_slice_in_the_batch_are_counted():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inside = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            halves = torch.stack(self.stem(x).chunk(2, dim=3), dim=1).flatten(0, 1)
            return self.inside(halves).unflatten(0, (-1, 2)).sum(1)

    assert trace(Windows()).multiplicity == {"stem": 1, "inside": 2}


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Linear(3, 3), "Linear has no 2D convolution: there is nothing to inflate"),
        (nn.Sequential(nn.Conv2d(3, 1, 3), nn.Linear(7, 7)), r"takes no \(2, 3, S, S\) image for S in 64"),
    ],
    ids=["no convolution", "no image"],
)
def test_what_cannot_be_traced_is_refused(net, message):
    with pytest.raises(SourceError, match=message):
        trace(net)
