"""A complete description of one training, as in a config file: data, network, recipe, strategy, seed."""

from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from medi3d.datasets.clips.settings import ClipSettings
from medi3d.datasets.cohorts.unlabelled import UnlabelledSettings
from medi3d.datasets.images.settings import ALL_FOLDS, VolumeSettings
from medi3d.datasets.sampling.augmentation import AugmentationSettings
from medi3d.engine.pretext import PretextSettings
from medi3d.engine.settings import PredictionSettings, TrainingSettings
from medi3d.errors import ConfigError
from medi3d.experiment.strategies import CONVERSIONS, TuningSettings, check_strategy
from medi3d.keys import check_name
from medi3d.models.networks import NetworkSettings


@dataclass(frozen=True)
class Experiment:
    """What all tasks share; each task adds its `data` (and augmentation).

    Raises:
        ConfigError: a value is not allowed; the message names its key.
    """

    task: str = MISSING
    """segmentation | classification | pretraining"""
    name: str = MISSING
    """of the run, and of its folder: runs/NAME"""
    seed: int = 0
    """of initial weights, sample order and augmentation"""
    strategy: str = "full"
    """original (no pretraining) | fixed (encoder frozen) | full (all trained)"""
    network: NetworkSettings = field(default_factory=NetworkSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    tuning: TuningSettings = field(default_factory=TuningSettings)
    prediction: PredictionSettings = field(default_factory=PredictionSettings)

    def __post_init__(self) -> None:
        check_strategy(self.strategy)
        self.tuning.check(self.strategy, self.is_pretrained)
        check_name("name", self.name)
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: 0 or more")

    @property
    def is_crossvalidation(self) -> bool:
        """Whether the experiment means one training for each fold."""
        return False

    @property
    def is_pretrained(self) -> bool:
        """Whether the encoder starts from weights: an artifact, or `network.weights`."""
        has_weights = self.network.weights is not None or self.network.source.endswith(".safetensors")
        return has_weights and self.strategy != "original"

    def without_pretraining(self) -> "Experiment":
        """The same network and recipe, from random weights.

        Raises:
            ConfigError: the source is an artifact, which is its weights.
        """
        if self.network.source.endswith(".safetensors"):
            raise ConfigError(
                f"network.source is {self.network.source!r}: an artifact holds weights, which strategy "
                "original cannot use; name the network that it was made from"
            )
        return replace(self, network=replace(self.network, weights=None))


@dataclass(frozen=True)
class SegmentationExperiment(Experiment):
    """Segmentation of volumes."""

    data: VolumeSettings = MISSING
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)

    @property
    def is_crossvalidation(self) -> bool:
        """Whether `data.fold` asks for all folds."""
        return self.data.fold == ALL_FOLDS

    def for_fold(self, number: int) -> "SegmentationExperiment":
        """The training of one fold."""
        return replace(self, name=f"{self.name}_fold{number}", data=replace(self.data, fold=number))


@dataclass(frozen=True)
class ClassificationExperiment(Experiment):
    """Classification of clips."""

    data: ClipSettings = MISSING


@dataclass(frozen=True)
class PretrainingExperiment(Experiment):
    """Pretraining of an encoder on volumes without labels, or on label maps without images."""

    data: UnlabelledSettings = MISSING
    pretext: PretextSettings = field(default_factory=PretextSettings)
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy != "full":
            raise ConfigError(f"strategy is {self.strategy!r}: pretraining trains all weights: use full")
        if self.tuning.batchnorm in CONVERSIONS:
            raise ConfigError(
                f"tuning.batchnorm is {self.tuning.batchnorm!r}: a pretraining keeps its batch norms"
            )


def segmentation_of(experiment: Experiment, place: str) -> SegmentationExperiment:
    """The experiment, if it is a segmentation.

    Args:
        experiment: of any task.
        place: its config or folder, for the message.

    Raises:
        ConfigError: it is of another task.
    """
    if not isinstance(experiment, SegmentationExperiment):
        raise ConfigError(f"{place}: task is {experiment.task}, where a segmentation is needed")
    return experiment


def clips_of(experiment: Experiment) -> ClipSettings:
    """The data settings of a classification.

    Raises:
        ConfigError: it is of another task.
    """
    if not isinstance(experiment, ClassificationExperiment):
        raise ConfigError(f"{experiment.name}: task is {experiment.task}, where a classification is needed")
    return experiment.data


TASKS: dict[str, type[Experiment]] = {
    "segmentation": SegmentationExperiment,
    "classification": ClassificationExperiment,
    "pretraining": PretrainingExperiment,
}
"""Word under `task` in a config -> the sections that it has."""
