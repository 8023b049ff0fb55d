"""From an experiment to its task and its network."""

import torch
from torch import nn

from medi3d.axes import to_triple
from medi3d.datasets.clips import read_clip_list
from medi3d.engine.task import Task, classification, segmentation
from medi3d.errors import ConfigError
from medi3d.models.networks import build_network
from medi3d.transfer.data import label_names
from medi3d.transfer.experiment import ClassificationExperiment, Experiment, SegmentationExperiment


def make_task(experiment: Experiment) -> Task:
    """The task of an experiment, with the names of its classes."""
    if isinstance(experiment, SegmentationExperiment):
        window = to_triple(experiment.prediction.window or experiment.data.patch, "prediction.window")
        return segmentation(label_names(experiment.data), window, overlap=experiment.prediction.overlap)
    if isinstance(experiment, ClassificationExperiment):
        return classification(read_clip_list(experiment.data).classes)
    raise ConfigError(f"task is {experiment.task!r}: unknown")


def make_network(experiment: Experiment, task: Task, *, pretrained: bool = True) -> nn.Module:
    """The network at its first step; `pretrained=False` leaves weights unread, as for a checkpoint."""
    if experiment.strategy == "original":
        experiment = experiment.without_pretraining()
    torch.manual_seed(experiment.seed)
    return build_network(experiment.network, task.name, len(task.classes), read_weights=pretrained)
