"""Settings of volumes: location, grid, intensities, labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from medi3d.errors import ConfigError
from medi3d.keys import younger

ALL_FOLDS = "all"

MODALITIES = ("CT", "MR", "PET", "US", "CBCT", "XA", "other")
"""Only CT is in HU; CBCT is not calibrated."""

NAN, MISSING_CHANNELS = ("refuse", "background"), ("refuse", "zeros")
MOST_LABELS = 255
"""Label maps are stored as bytes; 0 is background."""


@dataclass(frozen=True)
class Normalisation:
    """How intensities are normalised.

    Attributes:
        method: "percentile": per case, `percentiles` to [-1, 1], clipped (MR has no unit);
            "window": `window` to [-1, 1], clipped (CT); "zscore": per case, mean 0 and deviation 1.
        percentiles: Lower and upper, in percent.
        window: Lower and upper value in HU.
        background: If one value makes up more than half of a scan (zeros around an object), "ignored"
            leaves it out of percentiles, mean and deviation, which then describe the object;
            "counted", the default, uses all voxels, as runs from before this key do.
    """

    method: str = "percentile"
    percentiles: list[float] = field(default_factory=lambda: [0.5, 99.5])
    window: list[float] | None = None
    background: str = younger("counted")

    def __post_init__(self) -> None:
        if self.background not in ("counted", "ignored"):
            raise ConfigError(f"normalisation.background is {self.background!r}: counted or ignored")
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
class ChannelSettings:
    """One channel of a cohort whose channels are of different kinds, such as PET beside CT.

    Attributes:
        name: Name of the channel, as in the cohort's list.
        modality: As `VolumeSettings.modality`.
        normalisation: How its intensities are normalised.
    """

    name: str
    modality: str
    normalisation: Normalisation = field(default_factory=Normalisation)

    def __post_init__(self) -> None:
        check_intensities(self.modality, self.normalisation, f"channel {self.name}: ")


def check_intensities(modality: str, how: Normalisation, where: str = "") -> None:
    """Raise if the modality is unknown or the normalisation does not suit it.

    Raises:
        ConfigError: With `where` in front.
    """
    if modality not in MODALITIES:
        raise ConfigError(f"{where}modality is {modality!r}: {', '.join(MODALITIES)}")
    if modality == "CT" and how.method != "window":
        raise ConfigError(
            f"{where}normalisation.method is {how.method!r} for CT: its values are in HU, "
            "use method: window with window: [low, high] in HU"
        )
    if modality == "MR" and how.method == "window":
        raise ConfigError(
            f"{where}normalisation.method is 'window' for MR, which has no HU: percentile or zscore"
        )


@dataclass(frozen=True)
class VolumeSettings:
    """A cohort of volumes and how they are processed (config section).

    Attributes:
        root: Folder in the MSD layout, or a .csv or .json list.
        modality: "CT", "MR", "PET", "US", "CBCT", "XA" or "other"; with `by_channel`, that of
            the first channel.
        labels: Name -> value in the label files, a whole number (0 is background, named or not), at most 255
            labels. Inside, labels are numbered 1, 2, ... in the order of their values; masks are written
            with the values.
        symmetric: Pairs of labels to swap when left and right are mirrored, such as
            [[parotid_left, parotid_right]].
        empty_labels: Also accept cases in which nothing is labelled.
        overlaps: For labels with one mask each: all names, in the order in which they are put on one map.
            Where masks overlap, the later one wins. Empty: overlaps are an error.
        cache: Folder for preprocessed cases (`medi3d prepare` fills it); None reads and resamples them
            in each run.
        folds: Number of cross-validation folds, the list's own if it names a fold for each case;
            0 holds out `validation` cases instead.
        fold: Number of the validation fold, 0 to folds - 1; the others train. "all": each in turn.
        channels: Images per case (each 3D image of a 4D file counts).
        spacing: Voxel sides (depth, height, width) in mm to resample to; None keeps each case's own.
        normalisation: How intensities are normalised, if `by_channel` is empty.
        by_channel: Name, modality and normalisation of each channel, in order, if they differ. Empty, the
            default: `modality` and `normalisation` apply to all.
        nan: NaN voxels: "refuse" them, the default, or take them as "background", the lowest value of
            the image (0 in a label), which percentiles, mean and deviation then ignore.
        missing_channels: A channel with a single value: "refuse" it, the default, or treat it as missing and
            give the network "zeros".
        patch: Size (depth, height, width) in voxels of a training patch.
        foreground: Fraction of the patches that are centred on a labelled voxel, 0 to 1.
        validation: Number of cases held out for validation if the cohort names no split. 0: none; the
            training cases serve for validation (to overfit on purpose).
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
    by_channel: list[ChannelSettings] = younger([])
    nan: str = younger("refuse")
    missing_channels: str = younger("refuse")

    def __post_init__(self) -> None:
        if not self.by_channel:
            check_intensities(self.modality, self.normalisation)
        elif len(self.by_channel) != self.channels:
            raise ConfigError(
                f"by_channel names {len(self.by_channel)} channels where channels is {self.channels}"
            )
        elif self.modality != self.by_channel[0].modality:
            raise ConfigError(
                f"modality is {self.modality!r}, the first channel of by_channel is "
                f"{self.by_channel[0].modality!r}: they must be the same"
            )
        for key, known in (("nan", NAN), ("missing_channels", MISSING_CHANNELS)):
            if getattr(self, key) not in known:
                raise ConfigError(f"{key} is {getattr(self, key)!r}: {' or '.join(known)}")
        values = [value for value in self.labels.values() if value != 0]
        if not values or len(set(values)) < len(values) or max(map(abs, values)) >= 2**31:
            raise ConfigError(
                f"labels is {dict(self.labels)}: each label has a value of its own, a whole number but 0"
            )
        if len(values) > MOST_LABELS:
            raise ConfigError(f"labels names {len(values)} labels: {MOST_LABELS} at most")
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
        """Value in the files of label 0, 1, 2, ...: uint8 where that holds them, else int32."""
        values = [0, *(self.labels[name] for name in self.label_names)]
        return np.array(values, np.uint8 if min(values) >= 0 and max(values) < 256 else np.int32)

    def normalisation_of(self, channel: int) -> Normalisation:
        """Normalisation of channel 0, 1, ..."""
        return self.by_channel[channel].normalisation if self.by_channel else self.normalisation

    def name_of(self, channel: int) -> str:
        """Name of channel 0, 1, ..., for messages."""
        return f"channel {self.by_channel[channel].name if self.by_channel else channel}"

    @property
    def swaps(self) -> list[tuple[int, int]]:
        """Numbers of the labels to swap when left and right are mirrored."""
        number = {name: place for place, name in enumerate(self.label_names, 1)}
        return [(number[one], number[other]) for one, other in self.symmetric]


def _pair(key: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise ConfigError(f"{key} is {list(values)}: two numbers, [low, high]")
    return (values[0], values[1])
