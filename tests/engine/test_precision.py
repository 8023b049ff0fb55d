"""Gradients in bfloat16 are those in float32, but for rounding, however thin the volume."""

import pytest
import torch
from torch import nn

from medi3d.engine.precision import Precision
from medi3d.inflation import KernelPlan, inflate

CPU = torch.device("cpu")
NETWORKS = {
    "inflated, zeros along depth": lambda: inflate(
        nn.Conv2d(8, 16, 3, padding=1, bias=False), KernelPlan.video()
    ),
    "MONAI's or one's own": lambda: nn.Conv3d(8, 16, 3, padding=1, bias=False),
    "five taps": lambda: nn.Conv3d(8, 16, 5, padding=2, bias=False),
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
