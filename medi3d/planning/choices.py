"""Derive a config from a cohort's fingerprint: one choice, with its reason, for each key that was not given.

The choices follow nnU-Net's heuristics in spirit (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z):
spacing from the median. Intensities are chosen by `modality`, the patch is found by `patch_size`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medi3d.planning.fingerprint import Fingerprint

THICK = 3.0
"""Anisotropy (slice spacing over in-plane spacing) above which the median spacing is kept."""

HELD = 2.0
"""Anisotropy from which depth strides are delayed."""

LITTLE = 0.95
"""Below this Dice of a label with itself, resampled and back, the grid costs more than networks err by."""

ALIKE = 1.5
"""Largest ratio of voxel sides along an axis for which the cases can keep their own grids."""

Kept = Mapping[str, Mapping[str, float]]
"""Label -> "mean" and "worst" of that Dice, as `kept_by_grid` returns it."""

SIDES = re.compile(r"(?<![a-z])(left|right|l|r|lh|rh)(?![a-z])", re.IGNORECASE)
OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l", "lh": "rh", "rh": "lh"}


@dataclass(frozen=True)
class Choice:
    """A value for a key of the config, and the reason for it."""

    key: str
    value: Any
    why: str


def plan_data(fingerprint: Fingerprint, given: Mapping[str, Any], labels: Sequence[str]) -> list[Choice]:
    """Choose grid and symmetry where they are not given (intensities: `plan_channels`; patch: `plan_patch`).

    Args:
        fingerprint: of the cohort.
        given: dotted keys of the config -> values; these keys are not chosen.
        labels: names of the labels.
    """
    choices = _grid(fingerprint, given)
    pairs = symmetric_pairs(labels)
    if pairs:
        names = ", ".join(" / ".join(pair) for pair in pairs)
        choices.append(Choice("data.symmetric", pairs, f"names of two sides: {names}"))
        choices.append(
            Choice("augmentation.flip_axes", ["left-right"], "left and right labels change places with it")
        )
    return [choice for choice in choices if choice.key not in given]


def _grid(fingerprint: Fingerprint, given: Mapping[str, Any]) -> list[Choice]:
    """The target spacing; for thick slices also the plan and the augmentation."""
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
    """The choices, with another grid if isotropic voxels cost the labels much.

    The cohort's median spacing is used if it is better. If that costs much too and the cases' voxels have
    similar sizes, the scans keep their own grids, which cost nothing.

    Args:
        choices: of `plan_data`.
        fingerprint: of the cohort.
        kept_by: spacing -> what labels keep on that grid.
    """
    found = [choice for choice in choices if choice.key == "data.spacing" and choice.value]
    if not found or len(set(found[0].value)) > 1:  # given, nothing to resample, or not isotropic
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
    spared = [better if choice is cubes else choice for choice in choices]
    depth, plane = median[0], (median[1] * median[2]) ** 0.5
    if better is not cubes and depth >= HELD * plane:
        thick = f"slices are {depth / plane:.1f} times thicker than voxels are wide"
        spared.append(Choice("network.plan", {"from_spacing": median}, f"depth held back: {thick}"))
    return spared


def least_kept(kept: Kept) -> tuple[str, float] | None:
    """The label with the lowest mean Dice, and that Dice; None if no case is labelled."""
    means = [(values["mean"], name) for name, values in kept.items()]
    return (min(means)[1], min(means)[0]) if means else None


def symmetric_pairs(labels: Sequence[str]) -> list[list[str]]:
    """Pairs of labels whose names differ only in the side, such as parotid_left and parotid_right."""
    words = {name: re.sub(r"(?<=[a-z])(?=[A-Z])|[_-]", " ", name) for name in labels}  # RightParotid too
    spoken = {text.lower(): name for name, text in words.items()}
    pairs: list[list[str]] = []
    for name, text in words.items():
        mirrored = SIDES.sub(lambda side: OTHER_SIDE[side.group().lower()], text.lower())
        other = spoken.get(mirrored)
        if other is not None and other != name and [other, name] not in pairs:
            pairs.append([name, other])
    return pairs
