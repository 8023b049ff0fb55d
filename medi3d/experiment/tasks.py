"""What each task needs to be trained: one table, by the word under `task` in a config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medi3d.axes import to_triple
from medi3d.datasets.clips.clips import read_clip_list
from medi3d.engine.pretext import pretext
from medi3d.engine.task import Task, classification, segmentation
from medi3d.experiment.pretext_samples import PretextSamples
from medi3d.experiment.samples import Data, clip_data, volume_data
from medi3d.experiment.settings import (
    ClassificationExperiment,
    Experiment,
    PretrainingExperiment,
    SegmentationExperiment,
)
from medi3d.experiment.strategies import CONVERSIONS
from medi3d.models.networks import create_network
from medi3d.models.norms import convert_norms
from medi3d.models.pretext import create_pretext_network
from medi3d.models.video.registry import of_any_length


@dataclass(frozen=True)
class Needs:
    """What a task needs.

    Attributes:
        task: experiment -> losses, metrics, names of the classes.
        network: (settings, number of classes, options) -> the network at its first step.
        data: experiment -> training and validation samples.
        side: experiment -> height and width, the larger one, of what the network sees at once.
    """

    task: Callable[[Any], Task]
    network: Callable[..., nn.Module]
    data: Callable[[Any], Data]
    side: Callable[[Any], int]


def build_task(experiment: Experiment) -> Task:
    """The task of an experiment, with the names of its classes."""
    return NEEDS[experiment.task].task(experiment)


def build_network(
    experiment: Experiment,
    task: Task,
    *,
    pretrained: bool = True,
    proof: bool = True,
    checkpoint: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The network at its first step.

    Args:
        experiment: with its strategy and seed.
        task: from `build_task`.
        pretrained: False leaves pretrained weights unread, for a checkpoint that replaces them all.
        proof: False leaves out the proof of exactness, for a checkpoint whose training began with it.
        checkpoint: content of the checkpoint that fills the network; it knows what input files of the user
            expected when the training began.
    """
    if experiment.strategy == "original":
        experiment = experiment.without_pretraining()
    torch.manual_seed(experiment.seed)
    build = NEEDS[experiment.task].network
    options = {
        "read_weights": pretrained,
        "proof": proof,
        "contract": _known_contract(experiment, checkpoint),
        "size": NEEDS[experiment.task].side(experiment),
    }
    network = build(experiment.network, len(task.classes), **options)
    if experiment.tuning.batchnorm in CONVERSIONS:
        convert_norms(network.encoder, experiment.tuning.batchnorm)  # type: ignore[arg-type]
    return network


def _known_contract(
    experiment: Experiment, checkpoint: Mapping[str, Any] | None
) -> bool | Mapping[str, Any] | None:
    """The contract in a checkpoint, for weights from a file of the user; None: as the weights say."""
    weights = str(experiment.network.weights)
    if checkpoint is None or not experiment.network.contract or not weights.startswith(("file:", "hf:")):
        return None
    if "contract" not in checkpoint:  # from before version 0.2, which knew the contracts of artifacts alone
        return None if weights.endswith(".safetensors") else False
    return checkpoint["contract"] or False


def build_data(experiment: Experiment) -> Data:
    """The training and validation samples of an experiment.

    Raises:
        DataError: the cohort is missing, empty, or lacks labels that the task needs.
    """
    return NEEDS[experiment.task].data(experiment)


def _segmentation(experiment: SegmentationExperiment) -> Task:
    patch = to_triple(experiment.data.patch, "data.patch")
    window = to_triple(experiment.prediction.window or patch, "prediction.window")
    overlap = experiment.prediction.overlap
    return segmentation(experiment.data.label_names, window, overlap=overlap, patch=patch)


def _classification(experiment: ClassificationExperiment) -> Task:
    return classification(read_clip_list(experiment.data).classes, of_any_length)


def _pretext(experiment: PretrainingExperiment) -> Task:
    patch = to_triple(experiment.data.patch, "data.patch")
    return pretext(experiment.pretext, experiment.network.in_channels, patch)


def _pretext_data(experiment: PretrainingExperiment) -> Data:
    samples = PretextSamples(experiment)
    return Data(*samples.split(), samples.load, samples.change, samples.whole)


def _side_of_patch(experiment: SegmentationExperiment | PretrainingExperiment) -> int:
    patch = to_triple(experiment.data.patch, "data.patch")
    window = to_triple(experiment.prediction.window or patch, "prediction.window")
    return max(*patch[1:], *window[1:])


def _side_of_crop(experiment: ClassificationExperiment) -> int:
    return experiment.data.crop


def _builder(task: str) -> Callable[..., nn.Module]:
    return lambda settings, classes, **options: create_network(settings, task, classes, **options)


NEEDS: dict[str, Needs] = {
    "segmentation": Needs(_segmentation, _builder("segmentation"), volume_data, _side_of_patch),
    "classification": Needs(_classification, _builder("classification"), clip_data, _side_of_crop),
    "pretraining": Needs(_pretext, create_pretext_network, _pretext_data, _side_of_patch),
}
"""Word under `task` in a config -> what it needs; the sections of its config are in `settings.TASKS`."""
