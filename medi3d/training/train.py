"""One training from an experiment to its run folder."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from ignite.engine import Events
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
from medi3d.engine.log import log, shown_log
from medi3d.engine.precision import Precision
from medi3d.engine.state import TrainingState, check_finite, read_checkpoint
from medi3d.engine.task import Task
from medi3d.engine.trainer import build_evaluator, build_trainer
from medi3d.errors import ConfigError, Interrupted
from medi3d.evaluation.evaluate import cases_of, run_evaluation
from medi3d.experiment.run import Run
from medi3d.experiment.samples import Data
from medi3d.experiment.settings import Experiment
from medi3d.experiment.strategies import frozen_parts, parameter_groups
from medi3d.experiment.tasks import build_data, build_network, build_task
from medi3d.files import alone_in, read_table
from medi3d.inflation.checkpointing import checkpoint_activations
from medi3d.processes import deferred_signals, reported_workers
from medi3d.reports.plots import plot_curves
from medi3d.training.fine_tuning import GradualUnfreezing, adapt_encoder, pull_to_start, tune
from medi3d.training.pretrained_encoder import artifact_of, check_unseen, keep_encoder


def run_training(
    run: Run, *, resume: bool = False, split: str = "validation", moved: Collection[str] = ()
) -> dict[str, Any]:
    """Train, score the best network on the cases of a split, and leave all results in the run folder.

    Started by torchrun, the processes train one network together; the first one writes.

    Args:
        run: what to train, and where.
        resume: continue from the last checkpoint; from the start where there is none.
        split: see `run_evaluation`.
        moved: keys that may differ from those that the run was started with, such as "data.root".

    Returns:
        The last row of `metrics.csv`, and "best", the highest score.

    Raises:
        ConfigError: the folder holds a run already and `resume` is false, or that of another experiment; or
            several processes share a budget of compute.
        DataError: the data are damaged, or the folder cannot be written.
        TrainingError: the loss is no longer a number.
    """
    with distributed.joined_processes() as device:
        run.check(resume=resume, ignored=moved)
        distributed.wait_for_all()
        with _alone_in(run):
            if distributed.is_writer():
                run.start()
            distributed.wait_for_all()
            with shown_log(run.log):
                row = _train(run, device, split)
        writes = distributed.is_writer()
    if writes:
        with shown_log(run.log):
            if run.experiment.task == "pretraining":
                return {**row, **keep_encoder(run)}
            run_evaluation(run, split)
    return row


def _alone_in(run: Run) -> AbstractContextManager[None]:
    """Two trainings in one folder would mix their checkpoints; of torchrun's processes, one holds it."""
    return alone_in(run.folder, "training here") if distributed.is_writer() else nullcontext()


def _train(run: Run, device: torch.device, split: str) -> dict[str, Any]:
    experiment, settings = run.experiment, run.experiment.training
    task, data = build_task(experiment), build_data(experiment)
    if (settings.cpu_seconds or settings.gpu_seconds) and distributed.ranks() > 1:
        raise ConfigError(f"a budget of compute needs a single process, not {distributed.ranks()}")
    if experiment.task == "segmentation" and artifact_of(experiment):
        # Cases that are scored must be unseen; those that choose the checkpoint need not be.
        check_unseen(experiment, cases_of(run.volumes, split))
    precision, tuning = Precision.choose(settings.precision, device), experiment.tuning
    known = read_checkpoint(run.last) if run.last.is_file() else None
    network = build_network(experiment, task, checkpoint=known)
    frozen = tune(experiment, network, frozen_parts(network, experiment.strategy))
    if settings.checkpoint_activations:
        checkpoint_activations(network)
    precision.place_network(network)
    groups = parameter_groups(
        network, settings.learning_rate, settings.encoder_factor, decays=not tuning.l2_sp
    )
    state = TrainingState.create(network, groups, settings)
    if tuning.l2_sp:
        pull_to_start(state, tuning.l2_sp)
    if not run.last.is_file():
        with state.clock.apart():
            adapt_encoder(run, task, network, data, precision)
    else:
        state.load(run.last)
        log.info(f"resuming from step {state.step}")
    if not state.finished:
        _introduce(experiment, data, network, precision)
        _fit(run, task, data, state, precision, frozen)
    last = read_table(run.metrics)[-1] if distributed.is_writer() else {}
    return distributed.gather({**last, "best": state.best})[0]


def _fit(
    run: Run,
    task: Task,
    data: Data,
    state: TrainingState,
    precision: Precision,
    frozen: list[nn.Module],
) -> None:
    experiment, settings = run.experiment, run.experiment.training
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
    table = MetricsTable(run.metrics, state.step)
    progress = TrainingProgress(task.score, state.budget.position)
    plateau = PlateauWatch(table, state, task.score)

    def draw(_: Workflow) -> None:
        plot_curves(table.rows, task.score, run.plots / "curves.png")

    checkpoints = Checkpoints(run.best, run.last, state, task.score)
    for handler in (table, plateau, checkpoints, OnValidation(draw), progress):
        handler.attach(trainer)
    try:
        with reported_workers(), deferred_signals() as received:

            def stop(_: Workflow) -> None:
                if received() and not state.finished:
                    check_finite(state.network, state.step)
                    state.save(run.last)
                    raise Interrupted(f"stopped after step {state.step}; continue with --resume", received())

            trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
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
