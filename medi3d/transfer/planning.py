"""From a cohort's fingerprint to a config: every choice with its reason, each only where none was given.

What is chosen follows nnU-Net's heuristics in spirit (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z):
spacing from the median, patch as large as memory allows, intensities from the labelled voxels.
"""

import re
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from medi3d.axes import Triple
from medi3d.datasets.fingerprint import Fingerprint
from medi3d.engine import distributed
from medi3d.engine.precision import Precision
from medi3d.errors import ConfigError, Medi3dError
from medi3d.transfer.building import make_network, make_task
from medi3d.transfer.experiment import SegmentationExperiment

THICK = 3.0
"""Slices more than so many times thicker than in-plane voxels are wide keep their own spacing."""

LITTLE = 0.95
"""A label whose Dice with itself, onto the grid and back, is below this loses more than networks err by."""

ALIKE = 1.5
"""Cases whose voxels differ by no more along any axis can be learnt from on their own grids."""

Kept = Mapping[str, Mapping[str, float]]
"""Label -> "mean" and "worst" of that Dice, as `kept_by_grid` gives it."""

BATCH = 2
"""Samples a step: memory goes into the patch first, as in nnU-Net."""

LARGEST_PATCH = 192
"""Voxels along one axis; beyond it a patch costs more than its context is worth."""

MOST_STEPS = 6
"""Patches that are measured, at most."""

SIDES = re.compile(r"(?<![a-z])(left|right|l|r|lh|rh)(?![a-z])", re.IGNORECASE)
OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l", "lh": "rh", "rh": "lh"}


@dataclass(frozen=True)
class Choice:
    """A value for a key of the config, and why it is that."""

    key: str
    value: Any
    why: str


def plan_data(fingerprint: Fingerprint, given: Mapping[str, Any], labels: Sequence[str]) -> list[Choice]:
    """Choices for the keys of `data`, `augmentation` and `network` that are not given (patch apart).

    Args:
        fingerprint: of the cohort.
        given: dotted keys of the config -> values; what is in it is left as it is.
        labels: names of the labels.

    Raises:
        ConfigError: the modality is neither given nor clear from the intensities.
    """
    choices = [_modality(fingerprint, given), *_intensities(fingerprint, given), *_grid(fingerprint, given)]
    pairs = symmetric_pairs(labels)
    if pairs:
        names = ", ".join(" / ".join(pair) for pair in pairs)
        choices.append(Choice("data.symmetric", pairs, f"names of two sides: {names}"))
        choices.append(
            Choice("augmentation.flip_axes", ["left-right"], "left and right labels change places with it")
        )
    return [choice for choice in choices if choice.key not in given]


def _modality(fingerprint: Fingerprint, given: Mapping[str, Any]) -> Choice:
    lows = [case.intensities[0]["low"] for case in fingerprint.cases]
    known = given.get("data.modality") or fingerprint.modality
    if known is None:
        raise ConfigError(
            f"data.modality: not given, and not clear from the images (lowest values {min(lows):g} to "
            f"{max(lows):g}); add data.modality=CT or data.modality=MR"
        )
    return Choice("data.modality", known, f"lowest values are {min(lows):g} to {max(lows):g}")


def _intensities(fingerprint: Fingerprint, given: Mapping[str, Any]) -> list[Choice]:
    if _modality(fingerprint, given).value == "MR":
        why = "MR has no unit: each case by its own percentiles"
        return [Choice("data.normalisation", {"method": "percentile"}, why)]
    low, high = (round(value) for value in fingerprint.percentiles(0.5, 99.5))
    how = {"method": "window", "window": [float(low), float(max(high, low + 1))]}
    return [Choice("data.normalisation", how, "0.5 and 99.5 percentile of labelled voxels, all cases, HU")]


def _grid(fingerprint: Fingerprint, given: Mapping[str, Any]) -> list[Choice]:
    """Target spacing, and what follows where slices are thick: plan and augmentation."""
    median = fingerprint.spacing
    depth, plane = median[0], (median[1] * median[2]) ** 0.5
    shown = " x ".join(f"{side:.3g}" for side in median)
    if "data.spacing" not in given and depth > THICK * plane:
        kept = [float(f"{side:.4g}") for side in median]
        thick = f"slices are {depth / plane:.1f} times thicker than voxels are wide (over {THICK:g})"
        return [
            Choice("data.spacing", kept, f"median of the cohort, not made isotropic: {thick}"),
            Choice("network.plan", {"from_spacing": kept}, f"depth held back: {thick}"),
            Choice("augmentation.in_plane", True, thick),
        ]
    every = [side for case in fingerprint.cases for side in case.spacing]
    if max(every) <= 1.01 * min(every):
        why = f"all voxels are cubes of {median[0]:.3g} mm: nothing is resampled"
        return [Choice("data.spacing", None, why)]
    side = float(f"{(median[0] * median[1] * median[2]) ** (1 / 3):.3g}")
    why = f"isotropic, with as many voxels as the median spacing {shown} mm gives"
    return [Choice("data.spacing", [side] * 3, why)]


def spare_labels(
    choices: Sequence[Choice], fingerprint: Fingerprint, kept_by: Callable[[Sequence[float]], Kept]
) -> list[Choice]:
    """The choices, with another grid where cubes cost the labels much.

    The cohort's median spacing is taken if it is better; the scans' own grids, which cost nothing, where
    that costs much too and the cases have voxels of much the same size.

    Args:
        choices: of `plan_data`.
        fingerprint: of the cohort.
        kept_by: spacing -> what labels keep on that grid.
    """
    found = [choice for choice in choices if choice.key == "data.spacing" and choice.value]
    if not found or len(set(found[0].value)) > 1:  # given, nothing to resample, or no cubes
        return list(choices)
    (cubes,) = found
    lost = least_kept(kept_by(cubes.value))
    if lost is None or lost[1] >= LITTLE:
        return list(choices)
    why = f"on cubes of {cubes.value[0]:g} mm {lost[0]} keeps a Dice of {lost[1]:.3f} with itself"
    median = [float(f"{side:.3g}") for side in fingerprint.spacing]
    other = least_kept(kept_by(median))
    assert other is not None
    better = cubes
    if other[1] > lost[1]:
        better = replace(
            cubes, value=median, why=f"median of the cohort: {why}, here {other[0]} {other[1]:.3f}"
        )
    if other[1] < LITTLE and fingerprint.unevenness <= ALIKE:
        why = f"{why}, {other[0]} {other[1]:.3f} at the median spacing; voxels of the cases differ little"
        better = replace(cubes, value=None, why=f"each scan's own grid: {why} (at most {ALIKE:g} times)")
    return [better if choice is cubes else choice for choice in choices]


def least_kept(kept: Kept) -> tuple[str, float] | None:
    """The label that loses most, and what it keeps on the mean; None: no case is labelled."""
    means = [(values["mean"], name) for name, values in kept.items()]
    return (min(means)[1], min(means)[0]) if means else None


def symmetric_pairs(labels: Sequence[str]) -> list[list[str]]:
    """Pairs of labels that differ in the word for a side only, such as parotid_left and parotid_right."""
    words = {name: re.sub(r"(?<=[a-z])(?=[A-Z])|[_-]", " ", name) for name in labels}  # RightParotid too
    spoken = {text.lower(): name for name, text in words.items()}
    pairs: list[list[str]] = []
    for name, text in words.items():
        mirrored = SIDES.sub(lambda side: OTHER_SIDE[side.group().lower()], text.lower())
        other = spoken.get(mirrored)
        if other is not None and other != name and [other, name] not in pairs:
            pairs.append([name, other])
    return pairs


def plan_patch(experiment: SegmentationExperiment, fingerprint: Fingerprint, budget: float) -> list[Choice]:
    """The largest patch whose training step keeps to the memory, as a cube in mm as far as cases reach.

    Measured: a step is run on small patches in a process of its own, its memory taken to grow with the
    number of voxels, and the patch that follows is run too.

    Args:
        experiment: with spacing, network and batch size; its patch is not looked at.
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
        f"more than the {budget / 2**30:.1f} GB allowed; give more with --memory, or take a smaller network"
    )


def _promising(measured: Mapping[Triple, int], budget: float) -> int:
    """Voxels whose step should take nine tenths of the budget, by the two largest patches so far.

    At most eight times the largest, which is twice along each axis: small patches take what libraries and
    weights take, whatever their size, and a step far over the budget could bring the machine down.
    """
    sizes = sorted((_count(patch), used) for patch, used in measured.items())
    many, more = sizes[-1]
    if len(sizes) == 1:
        return 8 * many if more <= budget else int(many * budget / more)
    few, less = sizes[-2]
    rate = max((more - less) / (many - few), 1.0)
    return int(min(max(many + (0.9 * budget - more) / rate, 1.0), 8 * many))


def _patch(extent: Sequence[int], spacing: Sequence[float], voxels: int, multiple: int = 16) -> Triple:
    """Of at most so many voxels: an equal size in mm along each axis, as far as the case reaches."""

    def of_edge(mm: float) -> Triple:
        sides = [min(mm / side, n, LARGEST_PATCH) for side, n in zip(spacing, extent, strict=True)]
        # Up where the whole case is seen, down elsewhere, to what the strides of an encoder divide.
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
        Medi3dError: the step fails, for want of memory for one.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_step, args=(experiment, patch, theirs))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = f"it was ended from outside (exit code {process.exitcode}), for want of memory most likely"
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
        task = make_task(experiment)
        network = precision.place_network(make_network(experiment, task, pretrained=False)).train()
        optimiser = torch.optim.AdamW(network.parameters())
        shape = (experiment.training.batch_size, experiment.data.channels, *patch)
        label = torch.zeros((shape[0], 1, *patch), dtype=torch.uint8, device=device)
        for _ in range(2):  # the optimiser's moments exist from the second step on
            with precision.autocast():
                logits = network(precision.place(torch.rand(shape)))
            task.loss(logits, label).backward()
            optimiser.step()
            optimiser.zero_grad()
        answer.send(_peak_bytes(device) - before)
    except Exception as error:  # every failure must reach the parent, as a line
        answer.send(" ".join(str(error).split())[:300] or type(error).__name__)


def _peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held. (`getrusage` would count what its parent held, too.)"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS
