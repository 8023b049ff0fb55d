"""What a comparison scores in each task, and the words for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A score per case, 0 to 1, higher is better."""

    key: str
    """its column in `cases.csv` and `metrics.csv`"""
    name: str
    points: str
    """unit of differences, in hundredths"""
    axis: str
    case: str
    """what is scored; several: with an s"""
    unit: str
    """what varies at random in the intervals: cases of one unit are no new evidence"""
    head: str
    """the part of the network that no weights fill"""


MEASURES = {
    "segmentation": Measure("dice", "Dice", "Dice points", "Dice, hundredths", "case", "case", "decoder"),
    "classification": Measure("top1", "top-1", "points of top-1", "top-1, %", "clip", "scene", "head"),
}
"""Task -> its measure."""
