"""The training loop: MONAI's supervised engines with our own step. Everything else is a handler."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, EventEnum, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.utils import CommonKeys as Keys
from torch import nn
from torch.utils.data import DataLoader

from medi3d.engine import distributed
from medi3d.engine.metrics import Row
from medi3d.engine.precision import Precision, evaluating
from medi3d.engine.settings import TrainingSettings
from medi3d.engine.state import TrainingState
from medi3d.engine.task import Task
from medi3d.errors import TrainingError


class TrainingEvents(EventEnum):
    """What a trainer announces beside Ignite's own events."""

    VALIDATED = "validated"
    """`trainer.state.metrics` holds a new row"""


def build_trainer(
    task: Task,
    state: TrainingState,
    loader: DataLoader,
    settings: TrainingSettings,
    precision: Precision,
    *,
    seed: int = 0,
    frozen: Sequence[nn.Module] = (),
) -> SupervisedTrainer:
    """An engine that trains `state.network` from `state.step` until its budget is spent.

    Attach handlers (see `medi3d.engine.handlers`), then call `.run()`.

    Args:
        task: how batches, losses and metrics are made.
        state: what is trained; each step updates it.
        loader: the batches from `state.step` on, as many as there are steps left.
        settings: the recipe.
        precision: device, arithmetic and memory format.
        seed: of what is random inside the network (dropout); step n draws from (seed, n, rank).
        frozen: parts that stay in evaluation mode, so that their running statistics do not move.

    Raises:
        TrainingError: at the step whose loss is NaN or infinite.
    """
    network = distributed.wrap(state.network)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]

    def step(engine: Engine, batch: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(_step_seed(seed, state.step))
        network.train()
        for module in frozen:
            module.eval()
        image, target = task.prepare_batch(batch, precision)
        state.optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            logits = network(image)
        loss = task.loss(logits, target)
        _check_loss(loss, batch, engine.state.iteration)
        loss.backward()
        if settings.gradient_clip:
            nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
        state.optimizer.step()
        state.scheduler.step()
        if state.average is not None:
            state.average.update_parameters(state.network)
        state.step = engine.state.iteration
        if state.finished:
            engine.terminate()
        return {Keys.LOSS: float(loss.detach())}

    trainer = SupervisedTrainer(
        device=precision.device,
        max_epochs=1,  # one "epoch" of all steps: Ignite's epochs mean nothing for an endless stream
        epoch_length=settings.steps,
        train_data_loader=loader,
        network=network,
        optimizer=state.optimizer,
        loss_function=task.loss,
        inferer=SimpleInferer(),
        iteration_update=step,
        decollate=False,
        event_names=[TrainingEvents],
    )
    trainer.state.iteration = state.step
    _silence(trainer)
    return trainer


def build_evaluator(
    task: Task, network: nn.Module, loader: DataLoader, precision: Precision
) -> SupervisedEvaluator:
    """An engine that predicts the cases of `loader`, for `evaluate`.

    `.state.output["rows"]` has a row for each case.
    """

    def step(engine: Engine, batch: dict[str, Any]) -> dict[str, Any]:
        image, target = task.prepare_batch(batch, precision)
        network.eval()
        with precision.autocast():
            logits = task.inferer(image, network)
        loss = float(task.loss(logits, target))
        pred = task.postprocess(logits)
        rows = task.metrics(pred, target)
        named = zip(batch["name"], rows, strict=True)
        return {"rows": [{"name": name, "loss": loss, **row} for name, row in named]}

    evaluator = SupervisedEvaluator(
        device=precision.device,
        val_data_loader=loader,
        network=network,
        iteration_update=step,
        decollate=False,
    )
    _silence(evaluator)
    return evaluator


def evaluate(evaluator: SupervisedEvaluator) -> list[Row]:
    """Run `evaluator` in every process; each gets the rows of all cases, ordered by name."""
    rows: list[Row] = []
    collect = Events.ITERATION_COMPLETED, lambda e: rows.extend(e.state.output["rows"])
    with evaluating(), evaluator.add_event_handler(*collect):
        if evaluator.state.epoch_length:  # a process may have no case where there are few
            evaluator.run()
    everyone = [row for part in distributed.gather(rows) for row in part]
    return sorted(everyone, key=lambda row: str(row["name"]))


def _step_seed(seed: int, step: int) -> int:
    digest = hashlib.sha256(f"{seed} {step} {distributed.rank()}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _check_loss(loss: torch.Tensor, batch: dict[str, Any], step: int) -> None:
    if not torch.isfinite(loss):
        names = ", ".join(map(str, batch.get("name", ["unnamed"])))
        raise TrainingError(
            f"the loss is {float(loss.detach())} in step {step} (cases {names}): "
            "lower training.learning_rate, or try training.precision=fp32"
        )


def _silence(engine: Engine) -> None:
    # An exception reaches the caller; Ignite's own lines about it would only double the message.
    logger = logging.Logger("medi3d.engine.silent")
    logger.addHandler(logging.NullHandler())
    engine.logger = logger
