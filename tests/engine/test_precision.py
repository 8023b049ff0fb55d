"""Gradients in bfloat16 are those in float32, but for rounding, however thin the volume."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from medi3d.engine.precision import Precision, evaluating
from medi3d.inflation import KernelPlan, inflate

CPU = torch.device("cpu")
NETWORKS = {
    "inflated, zeros along depth": lambda: inflate(
        nn.Conv2d(8, 16, 3, padding=1, bias=False), KernelPlan.video()
    ),
    "MONAI's or one's own": lambda: nn.Conv3d(8, 16, 3, padding=1, bias=False),
    "five taps": lambda: nn.Conv3d(8, 16, 5, padding=2, bias=False),
    "padded by name": lambda: nn.Conv3d(8, 16, 3, padding="same", bias=False),
    "in groups": lambda: nn.Conv3d(16, 16, 3, padding=1, groups=4, bias=False),
}


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_weights_are_those_of_float32(name, depth):
    network = Precision(CPU, bf16=True).place_network(NETWORKS[name]())
    weight = next(network.parameters())
    volume = torch.randn(2, 16 if name == "in groups" else 8, depth, 6, 6)
    used = [torch.full((2**k,), float("nan")) for k in range(6, 20)]  # what memory may have held before
    del used
    gradients = []
    for bf16 in (True, False):
        precision = Precision(CPU, bf16)
        with precision.autocast():
            out = network(precision.place(volume))
        gradients.append(torch.autograd.grad(out.float().square().mean(), weight)[0])
    torch.testing.assert_close(*gradients, rtol=0.1, atol=0.03 * float(gradients[1].abs().max()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "valid"},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_placed_convolutions_compute_as_before(options):
    plain = nn.Conv3d(4, 4, 3, **options)
    volume = torch.randn(1, 4, 5, 6, 7)
    expected = plain(volume)
    placed = Precision(CPU, bf16=True).place_network(plain)
    torch.testing.assert_close(placed(volume), expected)


class Copies(TorchDispatchMode):
    """Counts the copies of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def test_weights_are_turned_into_bf16_once_where_they_stay_as_they_are():
    precision = Precision(CPU, bf16=True)
    network = precision.place_network(nn.Conv3d(4, 4, 3))
    with Copies(network.weight.shape) as copies, evaluating():
        for _ in range(3):
            with precision.autocast():
                out = network(torch.randn(1, 4, 5, 6, 7))
    assert copies.count == 1
    assert not out.requires_grad
    with torch.no_grad():
        network.weight.zero_()
    with precision.autocast():
        assert network(torch.ones(1, 4, 5, 6, 7)).unique().numel() <= 4, "a copy outlived its context"
