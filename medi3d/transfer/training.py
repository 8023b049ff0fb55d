"""One training from an experiment to its run folder."""

import json
from pathlib import Path
from typing import Any

import torch
from monai.engines.workflow import Workflow
from omegaconf import OmegaConf
from torch import nn

from medi3d.engine import distributed
from medi3d.engine.environment import describe
from medi3d.engine.handlers import (
    Checkpoints,
    MetricsTable,
    OnValidation,
    PlateauWatch,
    TrainingProgress,
    Validation,
)
from medi3d.engine.log import log, spoken_log
from medi3d.engine.plots import plot_curves
from medi3d.engine.precision import Precision
from medi3d.engine.state import TrainingState
from medi3d.engine.task import Task
from medi3d.engine.trainer import build_evaluator, build_trainer
from medi3d.errors import ConfigError, DataError
from medi3d.files import read_table, written_aside
from medi3d.transfer.building import make_network, make_task
from medi3d.transfer.data import Data, prepare_data
from medi3d.transfer.evaluation import cases_of, run_evaluation
from medi3d.transfer.experiment import Experiment, PretrainingExperiment, SegmentationExperiment
from medi3d.transfer.pretrained import artifact_of, check_unseen, keep_encoder
from medi3d.transfer.strategies import frozen_parts, parameter_groups
from medi3d.transfer.tuning import GradualUnfreezing, prepare_encoder, pull_to_start, tune

WITHOUT_EFFECT = ("workers", "cache_gb")
"""Keys of `training` that a resumed run may change: they do not touch the result."""


def run_training(
    experiment: Experiment, folder: Path, *, resume: bool = False, split: str = "validation"
) -> dict[str, Any]:
    """Train, judge the best network on the cases of a split, and leave it all in the run folder.

    Started by torchrun, the processes train one network together; the first one writes.

    Args:
        experiment: what to train.
        folder: the run folder; made if it is not there.
        resume: go on from the last checkpoint in `folder`; from the start where there is none.
        split: see `run_evaluation`.

    Returns:
        The last row of `metrics.csv`, and "best", the highest score.

    Raises:
        ConfigError: `folder` holds a run already and `resume` is false, or that of another experiment; or
            several processes share a budget of compute.
        DataError: the data are damaged, or `folder` cannot be written.
        TrainingError: the loss is no longer a number.
    """
    with distributed.joined_processes() as device:
        checkpoint = folder / "checkpoints" / "last.pt"
        check_folder(experiment, folder, checkpoint, resume)
        distributed.wait_for_all()
        if distributed.is_writer():
            start_folder(experiment, folder)
        distributed.wait_for_all()
        with spoken_log(folder / "log.txt"):
            row = _train(experiment, folder, checkpoint, device, split)
        writes = distributed.is_writer()
    if writes:
        with spoken_log(folder / "log.txt"):
            if isinstance(experiment, PretrainingExperiment):
                return {**row, **keep_encoder(experiment, folder)}
            run_evaluation(experiment, folder, split)
    return row


def _train(
    experiment: Experiment, folder: Path, checkpoint: Path, device: torch.device, split: str
) -> dict[str, Any]:
    settings, task, data = experiment.training, make_task(experiment), prepare_data(experiment)
    if (settings.cpu_seconds or settings.gpu_seconds) and distributed.ranks() > 1:
        raise ConfigError(f"training ends by compute: one process counts it, not {distributed.ranks()}")
    if isinstance(experiment, SegmentationExperiment) and artifact_of(experiment):
        # The cases that will judge; those that only choose the checkpoint may have been seen, unlabelled.
        check_unseen(experiment, cases_of(experiment.data, split))
    precision, tuning = Precision.choose(settings.precision, device), experiment.tuning
    network = make_network(experiment, task)
    frozen = tune(experiment, network, frozen_parts(network, experiment.strategy))
    precision.place_network(network)
    groups = parameter_groups(
        network, settings.learning_rate, settings.encoder_factor, decays=not tuning.l2_sp
    )
    state = TrainingState.create(network, groups, settings)
    if tuning.l2_sp:
        pull_to_start(state, tuning.l2_sp)
    if not checkpoint.is_file():
        with state.clock.apart():
            prepare_encoder(experiment, task, network, data, precision, folder)
    else:
        state.load(checkpoint)
        log.info(f"going on from step {state.step}")
    if not state.finished:
        _introduce(experiment, data, network, precision)
        _run(experiment, task, data, state, precision, frozen, folder)
    last = read_table(folder / "metrics.csv")[-1] if distributed.is_writer() else {}
    return distributed.gather({**last, "best": state.best})[0]


def _run(
    experiment: Experiment,
    task: Task,
    data: Data,
    state: TrainingState,
    precision: Precision,
    frozen: list[nn.Module],
    folder: Path,
) -> None:
    settings = experiment.training
    with state.clock.apart():
        batches = data.training_batches(state.step, settings, experiment.seed)
        validated = data.validation_batches(settings)
    trainer = build_trainer(task, state, batches, settings, precision, seed=experiment.seed, frozen=frozen)
    if experiment.tuning.unfreeze:
        GradualUnfreezing(state.network, state, experiment.tuning.unfreeze, frozen).attach(trainer)
    evaluator = build_evaluator(task, state.validated, validated, precision)
    Validation(evaluator, state, settings.validate_every).attach(trainer)
    if not distributed.is_writer():
        trainer.run()
        return
    table = MetricsTable(folder / "metrics.csv", state.step)
    progress = TrainingProgress(task.score, state.budget.position)
    plateau = PlateauWatch(table, state, task.score)

    def draw(_: Workflow) -> None:
        plot_curves(table.rows, task.score, folder / "plots" / "curves.png")

    checkpoints = Checkpoints(folder / "checkpoints", state, task.score)
    for handler in (table, plateau, checkpoints, OnValidation(draw), progress):
        handler.attach(trainer)
    try:
        trainer.run()
    finally:
        progress.close()


def check_folder(experiment: Experiment, folder: Path, checkpoint: Path, resume: bool) -> None:
    """Refuse a folder with a checkpoint, unless its run is to be resumed and is this one.

    Raises:
        ConfigError: as `run_training` says.
    """
    if not checkpoint.is_file():
        return
    if not resume:
        raise ConfigError(f"{folder}: holds a run already; go on with --resume, or take another name")
    defaults = OmegaConf.to_container(OmegaConf.structured(type(experiment)))  # of keys younger than the run
    there = OmegaConf.merge(defaults, OmegaConf.load(folder / "config.yaml"))
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


def start_folder(experiment: Experiment, folder: Path) -> None:
    """Make a run folder, with the resolved config and the environment.

    Raises:
        DataError: it cannot be written.
    """
    try:
        for part in (folder / "checkpoints", folder / "plots"):
            part.mkdir(parents=True, exist_ok=True)
        with written_aside(folder / "config.yaml") as aside:
            aside.write_text(OmegaConf.to_yaml(OmegaConf.create(_as_container(experiment))))
        with written_aside(folder / "environment.json") as aside:
            aside.write_text(json.dumps(describe(), indent=2))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another folder") from error


def _introduce(experiment: Experiment, data: Data, network: nn.Module, precision: Precision) -> None:
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in network.parameters())
    log.info(
        f"{experiment.name}: {len(data.training)} cases for training, {len(data.validation)} for validation; "
        f"{whole / 1e6:.2f} M weights, {trained / 1e6:.2f} M trained; {precision} on {precision.device}"
    )
