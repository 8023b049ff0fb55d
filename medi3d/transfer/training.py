"""One training from an experiment to its run folder."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.engines.workflow import Workflow
from omegaconf import OmegaConf
from torch import nn

from medi3d.axes import to_triple
from medi3d.engine import distributed
from medi3d.engine.environment import describe
from medi3d.engine.files import read_table, written_aside
from medi3d.engine.handlers import Checkpoints, MetricsTable, OnValidation, TrainingProgress, Validation
from medi3d.engine.plots import plot_curves
from medi3d.engine.precision import Precision
from medi3d.engine.state import TrainingState
from medi3d.engine.task import Task, segmentation
from medi3d.engine.trainer import build_evaluator, build_trainer
from medi3d.errors import ConfigError, DataError
from medi3d.models.networks import build_network
from medi3d.transfer.data import Data, label_names, prepare_data
from medi3d.transfer.experiment import Experiment, SegmentationExperiment
from medi3d.transfer.strategies import frozen_parts, parameter_groups

log = logging.getLogger("medi3d")

WITHOUT_EFFECT = ("workers", "cache_gb")
"""Keys of `training` that a resumed run may change: they do not touch the result."""


def run_training(experiment: Experiment, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train, and leave in `folder` config, environment, metrics, checkpoints, curves and log.

    Started by torchrun, the processes train one network together; the first one writes.

    Args:
        experiment: what to train.
        folder: the run folder; made if it is not there.
        resume: go on from the last checkpoint in `folder`; from the start where there is none.

    Returns:
        The last row of `metrics.csv`, and "best", the highest score.

    Raises:
        ConfigError: `folder` holds a run already and `resume` is false, or that of another experiment.
        DataError: the data are damaged, or `folder` cannot be written.
        TrainingError: the loss is no longer a number.
    """
    with distributed.joined_processes() as device:
        checkpoint = folder / "checkpoints" / "last.pt"
        _check_folder(experiment, folder, checkpoint, resume)
        distributed.wait_for_all()
        if distributed.is_writer():
            _start_folder(experiment, folder)
        distributed.wait_for_all()
        with _logged(folder / "log.txt"):
            return _train(experiment, folder, checkpoint, device)


def _train(experiment: Experiment, folder: Path, checkpoint: Path, device: torch.device) -> dict[str, Any]:
    settings, task, data = experiment.training, make_task(experiment), prepare_data(experiment)
    precision = Precision.choose(settings.precision, device)
    network = make_network(experiment, task)
    frozen = frozen_parts(network, experiment.strategy)
    precision.place_network(network)
    groups = parameter_groups(network, settings.learning_rate, settings.encoder_factor)
    state = TrainingState.create(network, groups, settings)
    if checkpoint.is_file():
        state.load(checkpoint)
        log.info(f"going on from step {state.step} of {settings.steps}")
    if state.step < settings.steps:
        _introduce(experiment, data, network, precision)
        _run(experiment, task, data, state, precision, frozen, folder)
    return {**read_table(folder / "metrics.csv")[-1], "best": state.best}


def _run(
    experiment: Experiment,
    task: Task,
    data: Data,
    state: TrainingState,
    precision: Precision,
    frozen: Any,
    folder: Path,
) -> None:
    settings = experiment.training
    batches = data.training_batches(state.step, settings, experiment.seed)
    trainer = build_trainer(task, state, batches, settings, precision, seed=experiment.seed, frozen=frozen)
    evaluator = build_evaluator(task, state.validated, data.validation_batches(settings), precision)
    Validation(evaluator, state, settings.validate_every).attach(trainer)
    if not distributed.is_writer():
        trainer.run()
        return
    table = MetricsTable(folder / "metrics.csv", state.step)
    progress = TrainingProgress(task.score)

    def draw(_: Workflow) -> None:
        plot_curves(table.rows, task.score, folder / "plots" / "curves.png")

    checkpoints = Checkpoints(folder / "checkpoints", state, task.score)
    for handler in (table, checkpoints, OnValidation(draw), progress):
        handler.attach(trainer)
    try:
        trainer.run()
    finally:
        progress.close()


def make_task(experiment: Experiment) -> Task:
    """The task of an experiment, with the names of its classes."""
    if isinstance(experiment, SegmentationExperiment):
        window = to_triple(experiment.prediction.window or experiment.data.patch, "prediction.window")
        return segmentation(label_names(experiment.data), window, overlap=experiment.prediction.overlap)
    raise ConfigError(f"task is {experiment.task!r}: unknown")


def make_network(experiment: Experiment, task: Task, *, pretrained: bool = True) -> nn.Module:
    """The network at its first step; `pretrained=False` leaves published weights unread."""
    if experiment.strategy == "original" or not pretrained:
        experiment = experiment.without_pretraining()
    torch.manual_seed(experiment.seed)
    return build_network(experiment.network, task.name, len(task.classes))


def _check_folder(experiment: Experiment, folder: Path, checkpoint: Path, resume: bool) -> None:
    if not checkpoint.is_file():
        return
    if not resume:
        raise ConfigError(f"{folder}: holds a run already; go on with --resume, or take another name")
    there = OmegaConf.load(folder / "config.yaml")
    different = _differences(OmegaConf.to_container(there), _as_container(experiment))
    for key in WITHOUT_EFFECT:
        different.pop(f"training.{key}", None)
    if different:
        key, (old, new) = next(iter(different.items()))
        raise ConfigError(
            f"{folder}: was started with {key}: {old}, not {new}; resume with the config that started it"
        )


def _differences(one: Any, other: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Path of each key whose values differ -> both values."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {key: (one, other)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*one, *other]):
        found |= _differences(one.get(name), other.get(name), f"{key}.{name}".lstrip("."))
    return found


def _as_container(experiment: Experiment) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(experiment), resolve=True)


def _start_folder(experiment: Experiment, folder: Path) -> None:
    try:
        for part in (folder / "checkpoints", folder / "plots"):
            part.mkdir(parents=True, exist_ok=True)
        with written_aside(folder / "config.yaml") as aside:
            aside.write_text(OmegaConf.to_yaml(OmegaConf.create(_as_container(experiment))))
        with written_aside(folder / "environment.json") as aside:
            aside.write_text(json.dumps(describe(), indent=2))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another folder") from error


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What the run says also goes into `path`, with the time; only in the process that writes."""
    if not distributed.is_writer():
        yield
        return
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()


def _introduce(experiment: Experiment, data: Data, network: nn.Module, precision: Precision) -> None:
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in network.parameters())
    log.info(
        f"{experiment.name}: {len(data.training)} cases for training, {len(data.validation)} for validation; "
        f"{whole / 1e6:.2f} M weights, {trained / 1e6:.2f} M trained; {precision} on {precision.device}"
    )
