"""Keep a label's largest component where that raised validation Dice."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from medi3d.engine.metrics import Row, mean_of_present
from medi3d.errors import ConfigError
from medi3d.files import writing, written_aside

TOUCHING = np.ones((3, 3, 3), bool)
"""Voxels that share a corner are connected."""


def keep_largest(mask: np.ndarray, numbers: Collection[int]) -> None:
    """Keep only the largest component of each label in `numbers`, in place."""
    boxes = ndimage.find_objects(mask)
    for number in numbers:
        box = boxes[number - 1] if number <= len(boxes) else None
        if box is None:
            continue
        parts, count = ndimage.label(mask[box] == number, TOUCHING)
        if count > 1:
            largest = int(np.bincount(parts.ravel())[1:].argmax()) + 1
            mask[box][(parts > 0) & (parts != largest)] = 0


def decide(rows: Sequence[Row]) -> list[str]:
    """Labels whose mean Dice over the cases is higher with the largest component alone.

    Args:
        rows: of the validation, each with label, dice and dice_largest.
    """
    gains: dict[str, list[float]] = {}
    for row in rows:
        gains.setdefault(row["label"], []).append(row["dice_largest"] - row["dice"])
    return [label for label, differences in gains.items() if mean_of_present(differences) > 0]


def write_largest(path: Path, labels: Sequence[str]) -> None:
    """Write which labels keep only their largest component, as JSON."""
    with writing(path), written_aside(path) as aside:
        aside.write_text(json.dumps({"largest_component": list(labels)}, indent=2) + "\n")


def read_largest(path: Path) -> list[str]:
    """The labels that keep only their largest component; none where there is no such file.

    Raises:
        ConfigError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        labels: Any = json.loads(path.read_text())["largest_component"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error!r}); delete it, or evaluate the run again") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ConfigError(f"{path}: largest_component must be a list of labels; delete it, or evaluate again")
    return labels
