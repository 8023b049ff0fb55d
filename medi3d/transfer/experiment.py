"""One training, said completely: data, network, recipe, strategy and seed. What a config file describes."""

import re
from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from medi3d.datasets.augmentation import AugmentationSettings
from medi3d.datasets.clips import ClipSettings
from medi3d.datasets.volumes import VolumeSettings
from medi3d.engine.settings import PredictionSettings, TrainingSettings
from medi3d.errors import ConfigError
from medi3d.models.networks import NetworkSettings
from medi3d.transfer.strategies import check_strategy


@dataclass(frozen=True)
class Experiment:
    """What all tasks share; each task adds its `data` (and augmentation).

    Raises:
        ConfigError: a value is not allowed; the message names its key.
    """

    task: str = MISSING
    """segmentation | classification"""
    name: str = MISSING
    """of the run, and of its folder: runs/NAME"""
    seed: int = 0
    """of the first weights, the order of samples and all that is random"""
    strategy: str = "full"
    """original (no pretraining) | fixed (encoder frozen) | full (all trained)"""
    network: NetworkSettings = field(default_factory=NetworkSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    prediction: PredictionSettings = field(default_factory=PredictionSettings)

    def __post_init__(self) -> None:
        check_strategy(self.strategy)
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(f"name is {self.name!r}: letters, digits, dot, dash and underscore only")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: 0 or more")

    def without_pretraining(self) -> "Experiment":
        """The same network and recipe, from random weights."""
        return replace(self, network=replace(self.network, weights=None))


@dataclass(frozen=True)
class SegmentationExperiment(Experiment):
    """Segmentation of volumes."""

    data: VolumeSettings = MISSING
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)


@dataclass(frozen=True)
class ClassificationExperiment(Experiment):
    """Classification of clips."""

    data: ClipSettings = MISSING


TASKS: dict[str, type[Experiment]] = {
    "segmentation": SegmentationExperiment,
    "classification": ClassificationExperiment,
}
"""Word under `task` in a config -> the sections that it has."""
