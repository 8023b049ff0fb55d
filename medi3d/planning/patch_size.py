"""The largest patch that a training step on this machine can take, found by running some."""

import re
import resource
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from medi3d.axes import Triple
from medi3d.engine import distributed
from medi3d.engine.precision import Precision
from medi3d.errors import Medi3dError
from medi3d.experiment.settings import SegmentationExperiment
from medi3d.experiment.tasks import build_network, build_task
from medi3d.planning.choices import Choice
from medi3d.planning.fingerprint import Fingerprint

LARGEST_PATCH = 192
"""Voxels along one axis; beyond it a patch costs more than its context is worth."""

MOST_STEPS = 6
"""Most patches that are measured."""


def plan_patch(experiment: SegmentationExperiment, fingerprint: Fingerprint, budget: float) -> list[Choice]:
    """The largest patch whose training step fits the memory: a cube in mm, where the cases are large enough.

    Steps on small patches are measured in a process of their own. Memory is assumed to grow linearly with
    the number of voxels, and the patch that follows from this is measured too.

    Args:
        experiment: with spacing, network and batch size; its patch is ignored.
        fingerprint: of the cohort.
        budget: bytes, on the device on which training runs.

    Raises:
        Medi3dError: not even the smallest patch fits, or the step fails.
    """
    spacing = experiment.data.spacing or list(fingerprint.spacing)
    extent = [max(1, round(mm / side)) for mm, side in zip(fingerprint.extent, spacing, strict=True)]
    measured: dict[Triple, int] = {}
    patch = _patch(extent, spacing, voxels=32**3)
    while patch not in measured and len(measured) < MOST_STEPS:
        measured[patch] = measure_step(experiment, patch)
        patch = _patch(extent, spacing, voxels=min(_promising(measured, budget), LARGEST_PATCH**3))
    fits = [patch for patch, used in measured.items() if used <= budget]
    if fits:
        patch = max(fits, key=_count)
        why = (
            f"{measured[patch] / 2**30:.1f} GB of {budget / 2**30:.1f} GB measured for a step of "
            f"{experiment.training.batch_size}; cases have {' x '.join(map(str, extent))} voxels"
        )
        return [Choice("data.patch", list(patch), why)]
    patch = min(measured, key=_count)
    raise Medi3dError(
        f"a training step on {' x '.join(map(str, patch))} voxels takes {measured[patch] / 2**30:.1f} GB, "
        f"more than the {budget / 2**30:.1f} GB allowed; raise --memory or use a smaller network"
    )


def _promising(measured: Mapping[Triple, int], budget: float) -> int:
    """Number of voxels whose step should take 90 % of the budget, extrapolated from the two largest patches.

    At most eight times the largest, twice along each axis. The memory of small patches is mostly that of
    libraries and weights, and a step far over the budget could bring the machine down.
    """
    sizes = sorted((_count(patch), used) for patch, used in measured.items())
    many, more = sizes[-1]
    if len(sizes) == 1:
        return 8 * many if more <= budget else int(many * budget / more)
    few, less = sizes[-2]
    rate = max((more - less) / (many - few), 1.0)
    return int(min(max(many + (0.9 * budget - more) / rate, 1.0), 8 * many))


def _patch(extent: Sequence[int], spacing: Sequence[float], voxels: int, multiple: int = 16) -> Triple:
    """A patch of at most `voxels` voxels, of equal size in mm along each axis, cut to the case's extent."""

    def of_edge(mm: float) -> Triple:
        sides = [min(mm / side, n, LARGEST_PATCH) for side, n in zip(spacing, extent, strict=True)]
        # Rounded to a multiple of the encoder's strides: up where the whole case is seen, down elsewhere.
        steps = [multiple if n >= multiple else 4 for n in extent]
        depth, height, width = (
            max(step, (-(-n // step) if side >= n else int(side) // step) * step)
            for side, n, step in zip(sides, extent, steps, strict=True)
        )
        return (int(depth), int(height), int(width))

    low, high = 1.0, max(n * side for n, side in zip(extent, spacing, strict=True)) + 1
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _count(of_edge(middle)) <= voxels else (low, middle)
    return of_edge(low)


def _count(patch: Triple) -> int:
    return patch[0] * patch[1] * patch[2]


def measure_step(experiment: SegmentationExperiment, patch: Triple) -> int:
    """Bytes that one training step takes on the training device, weights and optimiser included.

    Raises:
        Medi3dError: the step fails, for example for lack of memory.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_step, args=(experiment, patch, theirs))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = f"it was killed (exit code {process.exitcode}), most likely for lack of memory"
    process.join()
    if isinstance(answer, str):
        raise Medi3dError(f"a training step on a patch of {' x '.join(map(str, patch))} fails: {answer}")
    return int(answer)


def _step(experiment: SegmentationExperiment, patch: Triple, answer: Any) -> None:
    device = distributed.local_device()
    precision = Precision.choose(experiment.training.precision, device)
    before = _peak_bytes(device)
    try:
        experiment = replace(experiment, data=replace(experiment.data, patch=list(patch)))
        task = build_task(experiment)
        network = precision.place_network(build_network(experiment, task, pretrained=False)).train()
        optimiser = torch.optim.AdamW(network.parameters())
        shape = (experiment.training.batch_size, experiment.data.channels, *patch)
        label = torch.zeros((shape[0], 1, *patch), dtype=torch.uint8, device=device)
        for _ in range(2):  # the optimiser's moments exist only from the second step
            with precision.autocast():
                logits = network(precision.place(torch.rand(shape)))
            task.loss(logits, label).backward()
            optimiser.step()
            optimiser.zero_grad()
        answer.send(_peak_bytes(device) - before)
    except Exception as error:  # every failure must reach the parent, as one line
        answer.send(" ".join(str(error).split())[:300] or type(error).__name__)


def _peak_bytes(device: torch.device) -> int:
    """Peak memory of this process. (`getrusage` would include its parent's.)"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS
