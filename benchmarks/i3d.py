#!/usr/bin/env python
"""How fast medi3d runs I3D on the CPU, against the plain port that the field uses, with the same weights.

    OMP_NUM_THREADS=2 python benchmarks/i3d.py
    OMP_NUM_THREADS=2 python benchmarks/i3d.py --clips 32x112 --repeats 9 --json bench.json

The reference is piergiaj/pytorch-i3d's architecture and padding, rewritten below: `nn.Conv3d` without
padding behind an explicit `F.pad`, `nn.BatchNorm3d` (eps 1e-3), ReLU, zero-padded max-pools. Both run the
trunk up to Mixed_5c; forward in eval mode, clip after clip as the engine evaluates (bf16 copies of weights
are kept between clips), forward-backward in train mode. The port runs in float32 and default memory, as
published; medi3d in channels-last memory, in float32 and in bf16. Both process each clip in turn in one
process, so other load on the machine affects both equally. Reported are medians of the wall time and of the
CPU time of all threads, in seconds, and their ratios.
"""

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medi3d.engine.precision import Precision, evaluating
from medi3d.errors import WeightsError
from medi3d.inflation import KernelPlan
from medi3d.inflation.network import build
from medi3d.models.inception import LAYERS, MIXED_CHANNELS, InceptionV1
from medi3d.weights.load import load_weights

POOLS = {
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
}
GOALS = {
    "float32": {"forward": 1.25, "forward-backward": 1.1},
    "bf16": {"forward": 3.0, "forward-backward": 2.4},
}


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """TensorFlow's "same" padding as the port does it: zeros, always in a copy, an odd one at the end."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class PaddedPool(nn.MaxPool3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_same(x, self.kernel_size, self.stride))


class Unit(nn.Module):
    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, out_channels, (kernel,) * 3, (stride,) * 3, padding=0, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class Module(nn.Module):
    def __init__(self, channels: int, name: str) -> None:
        super().__init__()
        out = MIXED_CHANNELS[name]
        self.b0 = Unit(channels, out.branch_0, 1)
        self.b1a, self.b1b = Unit(channels, out.branch_1[0], 1), Unit(*out.branch_1, 3)
        self.b2a, self.b2b = Unit(channels, out.branch_2[0], 1), Unit(*out.branch_2, 3)
        self.b3a, self.b3b = PaddedPool((3, 3, 3), (1, 1, 1)), Unit(channels, out.branch_3, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))]
        return torch.cat(branches, dim=1)


def build_reference() -> nn.Sequential:
    """The port's trunk, `(B, 3, T, H, W)` -> `(B, 1024, T/8, H/32, W/32)`."""
    layers: dict[str, nn.Module] = {}
    channels = 3
    for name in LAYERS:
        if name in POOLS:
            layers[name] = PaddedPool(*POOLS[name])
        elif name in MIXED_CHANNELS:
            layers[name], channels = Module(channels, name), MIXED_CHANNELS[name].total
        else:
            out, kernel, stride = {"1a": (64, 7, 2), "2b": (64, 1, 1), "2c": (192, 3, 1)}[name[7:9]]
            layers[name], channels = Unit(channels, out, kernel, stride), out
    trunk = nn.Sequential()
    for name, layer in layers.items():
        trunk.add_module(name, layer)
    return trunk


def build_ours(weights: bool) -> nn.Module:
    """medi3d's I3D up to Mixed_5c, with the Kinetics weights or at random."""
    network, _ = build(InceptionV1(("Mixed_5c",)), KernelPlan.video())
    if weights:
        load_weights(network, "kinetics400/i3d-rgb")
    return network


def share_weights(reference: nn.Module, ours: nn.Module) -> None:
    """Copy the weights: units have the same order in both; ours have no scale, the port's is one."""
    theirs = [unit for unit in reference.modules() if isinstance(unit, Unit)]
    mine = [unit for unit in ours.modules() if hasattr(unit, "conv") and hasattr(unit, "bn")]
    for their, my in zip(theirs, mine, strict=True):
        their.conv3d.weight.data.copy_(my.conv.weight)
        for name in ("bias", "running_mean", "running_var"):
            getattr(their.bn, name).data.copy_(getattr(my.bn, name))


@dataclass(frozen=True)
class Figure:
    """One comparison: medians in seconds, and the speed-up of medi3d."""

    clip: str
    precision: str
    what: str
    reference_s: float
    ours_s: float
    ratio: float
    cpu_ratio: float
    difference: float
    """|ours - reference| / |reference| of the output in eval mode, Euclidean norms"""

    @property
    def goal(self) -> float:
        return GOALS[self.precision][self.what]


def forward(network: nn.Module, clip: Tensor, precision: Precision) -> Tensor:
    with precision.autocast():
        out = network(clip)
    return out[-1] if isinstance(out, list) else out


def forward_backward(network: nn.Module, clip: Tensor, precision: Precision) -> None:
    network.zero_grad(set_to_none=True)
    with precision.autocast():
        out = network(clip)
        out = out[-1] if isinstance(out, list) else out
    out.float().square().mean().backward()


def timed(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(reference: nn.Module, ours: nn.Module, size: str, repeats: int) -> list[Figure]:
    """All figures for clips of one size; the port runs in float32 and default memory, as published."""
    frames, side = (int(n) for n in size.split("x"))
    clip = torch.rand(1, 3, frames, side, side) * 2 - 1
    plain = Precision(torch.device("cpu"), bf16=False)
    figures = []
    for name in GOALS:
        fast = Precision(plain.device, bf16=name == "bf16")
        network = fast.place_network(build_like(ours)) if fast.bf16 else in_channels_last(build_like(ours))
        share_weights(reference, ours)  # the training passes below change the norms' statistics
        placed = Precision.lay_out(clip)
        reference.eval(), network.eval()
        with evaluating():
            expected, found = forward(reference, clip, plain), forward(network, placed, fast).float()
        difference = float((found - expected).norm() / expected.norm())
        for what, run in (("forward", forward), ("forward-backward", forward_backward)):
            reference.train(what != "forward"), network.train(what != "forward")
            theirs, mine = partial(run, reference, clip, plain), partial(run, network, placed, fast)
            with evaluating() if what == "forward" else contextlib.nullcontext():
                theirs(), mine()  # the first runs choose kernels and allocate memory
                times = [(timed(theirs), timed(mine)) for _ in range(repeats)]
            (wall_a, cpu_a), (wall_b, cpu_b) = (
                [statistics.median(column) for column in zip(*side_, strict=True)]
                for side_ in zip(*times, strict=True)
            )
            figures.append(
                Figure(size, name, what, wall_a, wall_b, wall_a / wall_b, cpu_a / cpu_b, difference)
            )
            print(line(figures[-1]), flush=True)
    return figures


def in_channels_last(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        parameter.data = Precision.lay_out(parameter.data)
    return network


def build_like(ours: nn.Module) -> nn.Module:
    network = build_ours(weights=False)
    network.load_state_dict(ours.state_dict())
    return network


def line(figure: Figure) -> str:
    met = "met" if figure.ratio >= figure.goal else "MISSED"
    seconds = f"{figure.reference_s:.3f} | {figure.ours_s:.3f}"
    ratios = f"{figure.ratio:.2f} | {figure.cpu_ratio:.2f} | {figure.goal} {met}"
    what = f"{figure.clip} | {figure.precision} | {figure.what}"
    return f"| {what} | {seconds} | {ratios} | {figure.difference:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", nargs="+", default=["32x112", "64x224"], help="frames x pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    try:
        ours, weights = build_ours(weights=True), "kinetics400/i3d-rgb"
    except WeightsError:
        ours, weights = build_ours(weights=False), "random"
    reference = build_reference()
    threads = f"{torch.get_num_threads()} threads, {arguments.repeats} repeats"
    print(f"torch {torch.__version__}, {threads}, weights {weights}")
    print("| clip | precision | what | port s | medi3d s | ratio | CPU ratio | goal | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    figures = [f for size in arguments.clips for f in compare(reference, ours, size, arguments.repeats)]
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(figure) for figure in figures], file, indent=1)


if __name__ == "__main__":
    main()
