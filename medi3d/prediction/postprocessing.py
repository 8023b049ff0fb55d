"""Of a label only its largest component, where validation showed that this is better."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from medi3d.engine.metrics import Row
from medi3d.errors import ConfigError
from medi3d.files import written_aside

FILE = "postprocessing.json"
TOUCHING = np.ones((3, 3, 3), bool)
"""Voxels that share a corner belong together."""


def keep_largest(mask: np.ndarray, numbers: Collection[int]) -> None:
    """Turn all but the largest component of each of the labels `numbers` into background, in place."""
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
    """Labels whose mean Dice over the cases is better with the largest component alone.

    Args:
        rows: of the validation, each with label, dice and dice_largest.
    """
    gains: dict[str, list[float]] = {}
    for row in rows:
        gains.setdefault(row["label"], []).append(row["dice_largest"] - row["dice"])
    return [label for label, differences in gains.items() if np.nanmean(differences) > 0]


def write_largest(folder: Path, labels: Sequence[str]) -> None:
    """Store the decision in a run folder."""
    with written_aside(folder / FILE) as aside:
        aside.write_text(json.dumps({"largest_component": list(labels)}, indent=2) + "\n")


def read_largest(folder: Path) -> list[str]:
    """The labels of which a run keeps the largest component; none where nothing was decided.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        labels: Any = json.loads(path.read_text())["largest_component"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error!r}); take it away, or evaluate the run again") from error
    return list(labels)
