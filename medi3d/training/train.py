"""One training from an experiment to its run folder."""

from pathlib import Path
from typing import Any

import torch
from monai.engines.workflow import Workflow
from torch import nn

from medi3d.engine import distributed
from medi3d.engine.handlers import (
    Checkpoints,
    MetricsTable,
    OnValidation,
    PlateauWatch,
    TrainingProgress,
    Validation,
)
from medi3d.engine.log import log, spoken_log
from medi3d.engine.precision import Precision
from medi3d.engine.state import TrainingState
from medi3d.engine.task import Task
from medi3d.engine.trainer import build_evaluator, build_trainer
from medi3d.errors import ConfigError
from medi3d.evaluation.evaluate import cases_of, run_evaluation
from medi3d.experiment.building import make_network, make_task
from medi3d.experiment.run_folder import check_folder, start_folder
from medi3d.experiment.samples import Data, prepare_data
from medi3d.experiment.settings import Experiment, PretrainingExperiment, SegmentationExperiment
from medi3d.experiment.strategies import frozen_parts, parameter_groups
from medi3d.files import read_table
from medi3d.reports.plots import plot_curves
from medi3d.training.fine_tuning import GradualUnfreezing, prepare_encoder, pull_to_start, tune
from medi3d.training.pretrained_encoder import artifact_of, check_unseen, keep_encoder


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


def _introduce(experiment: Experiment, data: Data, network: nn.Module, precision: Precision) -> None:
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in network.parameters())
    log.info(
        f"{experiment.name}: {len(data.training)} cases for training, {len(data.validation)} for validation; "
        f"{whole / 1e6:.2f} M weights, {trained / 1e6:.2f} M trained; {precision} on {precision.device}"
    )
