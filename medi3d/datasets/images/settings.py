"""Settings of volumes: where they are, their grid, their intensities, their labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from medi3d.errors import ConfigError

ALL_FOLDS = "all"


@dataclass(frozen=True)
class Normalisation:
    """How intensities become the range that networks take.

    Attributes:
        method: "percentile": per case, `percentiles` to [-1, 1], clipped (MR: no unit of its own);
            "window": `window` to [-1, 1], clipped (CT); "zscore": per case, mean 0 and deviation 1.
        percentiles: Lower and upper, in percent.
        window: Lower and upper value in HU.
    """

    method: str = "percentile"
    percentiles: list[float] = field(default_factory=lambda: [0.5, 99.5])
    window: list[float] | None = None

    def __post_init__(self) -> None:
        if self.method not in ("percentile", "window", "zscore"):
            raise ConfigError(f"normalisation.method is {self.method!r}: percentile, window or zscore")
        low, high = _pair("normalisation.percentiles", self.percentiles)
        if not 0 <= low < high <= 100:
            raise ConfigError(
                f"normalisation.percentiles is {self.percentiles}: two rising, within 0 and 100"
            )
        if self.method != "window":
            return
        if self.window is None:
            raise ConfigError("normalisation.window is missing: method window needs [low, high] in HU")
        low, high = _pair("normalisation.window", self.window)
        if not low < high:
            raise ConfigError(f"normalisation.window is {self.window}: [low, high] in HU, rising")


@dataclass(frozen=True)
class VolumeSettings:
    """A cohort of volumes and what is done to each of them (config section).

    Attributes:
        root: Folder in the MSD layout, or a .csv or .json list.
        modality: "MR" or "CT".
        labels: Name -> value in the label files, 0 to 255 (0 is background, named or not). Inside, labels
            are numbered 1, 2, ... in the order of their values; masks are written with the values.
        symmetric: Pairs of labels that change places when left and right do, such as
            [[parotid_left, parotid_right]].
        empty_labels: Take cases in which nothing is labelled, too.
        overlaps: Of labels kept in a mask each, all names, in the order in which they are put on one map:
            where masks overlap, the later one wins. Empty: overlapping masks are refused.
        cache: Folder in which cases are kept as the network takes them (`medi3d prepare` fills it);
            None reads and resamples them in each run.
        folds: Parts of the cohort for cross-validation; 0 holds back `validation` cases instead.
        fold: Which of them validates, 0 to folds - 1; the others train. "all": each in turn.
        channels: Images a case (a 4D file counts each).
        spacing: Voxel sides (depth, height, width) in mm to resample to; None keeps each case's own.
        normalisation: Of intensities.
        patch: Size (depth, height, width) in voxels of what one training step sees of a case.
        foreground: Part of the patches that is centred on a labelled voxel, 0 to 1.
        validation: Cases held back for validation where the cohort itself names no split.
        split_seed: Seed of that split.
    """

    root: str
    modality: str
    labels: dict[str, int]
    channels: int = 1
    spacing: list[float] | None = None
    normalisation: Normalisation = field(default_factory=Normalisation)
    patch: list[int] = field(default_factory=lambda: [96, 96, 96])
    foreground: float = 0.5
    validation: int = 40
    split_seed: int = 0
    symmetric: list[list[str]] = field(default_factory=list)
    empty_labels: bool = False
    cache: str | None = None
    overlaps: list[str] = field(default_factory=list)
    folds: int = 0
    fold: int | str = 0

    def __post_init__(self) -> None:
        if self.modality not in ("MR", "CT"):
            raise ConfigError(f"modality is {self.modality!r}: MR or CT")
        if self.modality == "CT" and self.normalisation.method != "window":
            raise ConfigError(
                f"normalisation.method is {self.normalisation.method!r} for CT: HU have a meaning, "
                "use method: window with window: [low, high] in HU"
            )
        if self.modality == "MR" and self.normalisation.method == "window":
            raise ConfigError(
                "normalisation.method is 'window' for MR, which has no HU: percentile or zscore"
            )
        values = [value for value in self.labels.values() if value != 0]
        if not values or len(set(values)) < len(values) or not all(0 < value <= 255 for value in values):
            raise ConfigError(f"labels is {dict(self.labels)}: each label has a value of its own, 1 to 255")
        for pair in self.symmetric:
            if len(pair) != 2 or not set(pair) <= set(self.label_names):
                raise ConfigError(f"symmetric has {list(pair)}: two names of {', '.join(self.label_names)}")
        if self.overlaps and sorted(self.overlaps) != sorted(self.label_names):
            raise ConfigError(f"overlaps is {self.overlaps}: each of {', '.join(self.label_names)} once")
        if self.channels < 1:
            raise ConfigError(f"channels is {self.channels}: 1 or more")
        if self.spacing is not None and (len(self.spacing) != 3 or min(self.spacing) <= 0):
            raise ConfigError(f"spacing is {self.spacing}: three sides (depth, height, width) in mm, above 0")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ConfigError(
                f"patch is {self.patch}: three sizes (depth, height, width) in voxels, 1 or more"
            )
        if not 0 <= self.foreground <= 1:
            raise ConfigError(f"foreground is {self.foreground}: a part between 0 and 1")
        if (
            self.folds < 0
            or self.folds == 1
            or self.fold not in (*range(max(self.folds, 1)), *self._all_folds)
        ):
            raise ConfigError(
                f"folds is {self.folds}, fold {self.fold}: two folds or more (0: no folds), counted from 0; "
                f"or fold {ALL_FOLDS}"
            )
        if self.validation < 0:
            raise ConfigError(f"validation is {self.validation}: a number of cases, 0 or more")

    @property
    def _all_folds(self) -> tuple[str, ...]:
        return (ALL_FOLDS,) if self.folds else ()

    @property
    def label_names(self) -> list[str]:
        """Names of the labels 1, 2, ..., in the order of their values in the files."""
        named = [(value, name) for name, value in self.labels.items() if value != 0]
        return [name for _, name in sorted(named)]

    @property
    def file_values(self) -> np.ndarray:
        """Value in the files of label 0, 1, 2, ...: uint8."""
        return np.array([0, *(self.labels[name] for name in self.label_names)], np.uint8)

    @property
    def swaps(self) -> list[tuple[int, int]]:
        """Numbers of the labels that change places when left and right do."""
        number = {name: place for place, name in enumerate(self.label_names, 1)}
        return [(number[one], number[other]) for one, other in self.symmetric]


def _pair(key: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise ConfigError(f"{key} is {list(values)}: two numbers, [low, high]")
    return (values[0], values[1])
