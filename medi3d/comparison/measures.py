"""The score that a comparison uses in each task, and its wording."""

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
    """what is scored, singular; plural with s"""
    unit: str
    """the resampling unit of the intervals: cases of one unit are not independent"""
    head: str
    """the part of the network that starts at random"""


MEASURES = {
    "segmentation": Measure("dice", "Dice", "Dice points", "Dice, hundredths", "case", "case", "decoder"),
    "classification": Measure("top1", "top-1", "points of top-1", "top-1, %", "clip", "scene", "head"),
}
"""Task -> its measure."""
