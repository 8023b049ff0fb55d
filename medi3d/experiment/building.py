"""From an experiment to its task and its network."""

import torch
from torch import nn

from medi3d.axes import to_triple
from medi3d.datasets.clips.clips import read_clip_list
from medi3d.engine.pretext import pretext
from medi3d.engine.task import Task, classification, segmentation
from medi3d.errors import ConfigError
from medi3d.experiment.settings import (
    ClassificationExperiment,
    Experiment,
    PretrainingExperiment,
    SegmentationExperiment,
)
from medi3d.experiment.strategies import CONVERSIONS
from medi3d.models.networks import build_network
from medi3d.models.norms import convert_norms
from medi3d.models.pretext import pretext_network
from medi3d.models.video.registry import of_any_length


def make_task(experiment: Experiment) -> Task:
    """The task of an experiment, with the names of its classes."""
    if isinstance(experiment, SegmentationExperiment):
        patch = to_triple(experiment.data.patch, "data.patch")
        window = to_triple(experiment.prediction.window or patch, "prediction.window")
        overlap = experiment.prediction.overlap
        return segmentation(experiment.data.label_names, window, overlap=overlap, patch=patch)
    if isinstance(experiment, ClassificationExperiment):
        return classification(read_clip_list(experiment.data).classes, of_any_length)
    if isinstance(experiment, PretrainingExperiment):
        patch = to_triple(experiment.data.patch, "data.patch")
        return pretext(experiment.pretext, experiment.network.in_channels, patch)
    raise ConfigError(f"task is {experiment.task!r}: unknown")


def make_network(experiment: Experiment, task: Task, *, pretrained: bool = True) -> nn.Module:
    """The network at its first step; `pretrained=False` leaves weights unread, as for a checkpoint."""
    if experiment.strategy == "original":
        experiment = experiment.without_pretraining()
    torch.manual_seed(experiment.seed)
    if isinstance(experiment, PretrainingExperiment):
        network = pretext_network(experiment.network, len(task.classes), read_weights=pretrained)
    else:
        network = build_network(experiment.network, task.name, len(task.classes), read_weights=pretrained)
    if experiment.tuning.batchnorm in CONVERSIONS:
        convert_norms(network.encoder, experiment.tuning.batchnorm)  # type: ignore[arg-type]
    return network
