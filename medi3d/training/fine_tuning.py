"""Treatment of a pretrained encoder before and during fine-tuning, beyond its learning rate."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from ignite.engine import Events
from monai.engines.workflow import Workflow
from torch import Tensor, nn

from medi3d.datasets.sampling.stream import TrainingStream, collate
from medi3d.engine import distributed
from medi3d.engine.log import log
from medi3d.engine.precision import Precision
from medi3d.engine.state import TrainingState
from medi3d.engine.task import Task
from medi3d.errors import ConfigError
from medi3d.experiment.run import Run
from medi3d.experiment.samples import Data
from medi3d.experiment.settings import Experiment
from medi3d.experiment.strategies import CONVERSIONS
from medi3d.experiment.tasks import build_network
from medi3d.files import write_table
from medi3d.models.norms import batch_norms, freeze_norms
from medi3d.training.domain_shift import measure_drift, recalibrate, stages

CALIBRATION = 32
"""Number of training samples for recalibrating batch norms."""


def adapt_encoder(run: Run, task: Task, network: nn.Module, data: Data, precision: Precision) -> None:
    """Before the first step: recalibrate batch norms if asked, and write `drift.csv` of a pretrained encoder.

    The table has the rows of `measure_drift` on the first training samples: for the loaded weights, and again
    where the batch norm policy changed something.
    """
    experiment, tuning = run.experiment, run.experiment.tuning
    encoder: Any = getattr(network, "encoder", None)
    measured = tuning.drift_samples > 0 and experiment.is_pretrained and distributed.is_writer()
    rows: list[dict[str, Any]] = []
    if measured:
        loaded: Any = network
        if tuning.batchnorm in CONVERSIONS:
            plain = replace(experiment, tuning=replace(tuning, batchnorm="keep"))
            loaded = precision.place_network(build_network(plain, task))
        rows += _drift("loaded", loaded.encoder, experiment, data, precision)
    if tuning.batchnorm == "recalibrate":
        recalibrate(encoder, _volumes(experiment, data, CALIBRATION), precision)
    if measured and tuning.batchnorm in (*CONVERSIONS, "recalibrate"):
        rows += _drift(tuning.batchnorm, encoder, experiment, data, precision)
    if rows:
        write_table(run.drift, rows)
        worst = max((row for row in rows if row["weights"] == "loaded"), key=lambda row: row["spread"])
        log.info(
            f"drift of loaded weights: variance off by e^{worst['spread']:.2f} in stage {worst['stage']}"
        )


def _drift(
    name: str, encoder: nn.Module, experiment: Experiment, data: Data, precision: Precision
) -> list[dict[str, Any]]:
    volumes = _volumes(experiment, data, experiment.tuning.drift_samples)
    return [{"weights": name, **row} for row in measure_drift(encoder, volumes, precision)]


def _volumes(experiment: Experiment, data: Data, count: int) -> Iterator[Tensor]:
    """The images of the first training samples, in batches as in training."""
    stream = TrainingStream(data.training, data.load, data.change, experiment.seed)
    size = experiment.training.batch_size
    for first in range(0, count, size):
        yield collate([stream[number] for number in range(first, min(first + size, count))])["image"]


def tune(experiment: Experiment, network: nn.Module, frozen: Sequence[nn.Module]) -> list[nn.Module]:
    """Parts that stay in evaluation mode: `frozen`, and batch norms if they are to be frozen.

    Raises:
        ConfigError: the encoder has no batch norm to recalibrate, freeze or convert.
    """
    policy = experiment.tuning.batchnorm
    encoder = getattr(network, "encoder", None)
    if policy in ("recalibrate", "freeze") and not (isinstance(encoder, nn.Module) and batch_norms(encoder)):
        raise ConfigError(f"tuning.batchnorm is {policy!r}: this network's encoder has no batch norm")
    return [*frozen, *(freeze_norms(network.encoder) if policy == "freeze" else [])]  # type: ignore[arg-type]


def pull_to_start(state: TrainingState, strength: float) -> None:
    """L2-SP (Li et al. 2018, arXiv:1802.01483): the encoder's weights decay to where they start, not to 0.

    After each step every weight w moves by lr · strength · (w₀ − w), the gradient of ½ · strength · ‖w −
    w₀‖², decoupled from Adam's scaling like AdamW's weight decay. Call it before a checkpoint is loaded.
    """
    groups = [group for group in state.optimizer.param_groups if group["name"] == "encoder"]
    starts = {p: p.detach().clone() for group in groups for p in group["params"]}

    @torch.no_grad()
    def pull(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in starts and parameter.grad is not None:
                    parameter.lerp_(starts[parameter], group["lr"] * strength)

    state.optimizer.register_step_post_hook(pull)


class GradualUnfreezing:
    """Unfreezes the encoder's stages one after another, deepest first (ULMFiT: Howard & Ruder 2018).

    With L stages the deepest is trained after a fraction share/L of the training, the finest after `share`; a
    waiting stage is frozen, running statistics included. The step alone decides which.

    Args:
        network: has an encoder that gives a list of maps.
        state: knows the progress of the training.
        share: fraction of the training in which part of the encoder is frozen, 0 to 1.
        frozen: the trainer's list of modules in evaluation mode; it is kept up to date.
    """

    def __init__(self, network: nn.Module, state: TrainingState, share: float, frozen: list[nn.Module]):
        if distributed.ranks() > 1:
            raise ConfigError("tuning.unfreeze works in one process only; leave it at 0 with torchrun")
        self.state, self.share, self.frozen, self.always = state, share, frozen, list(frozen)
        encoder: Any = network.encoder
        named = dict(encoder.named_parameters())
        trained = {name for name, p in named.items() if p.requires_grad}
        self.stages = [[named[name] for name in names if name in trained] for names in stages(encoder)]
        owners = {id(p): module for module in encoder.modules() for p in module.parameters(recurse=False)}
        self.owners = [list({owners[id(p)]: None for p in stage}) for stage in self.stages]

    def attach(self, trainer: Workflow) -> None:
        """Watch `trainer`."""
        trainer.add_event_handler(Events.ITERATION_STARTED, self._set)

    def waiting(self, step: int) -> list[bool]:
        """For each stage, finest first, whether it is frozen in the step after `step` steps."""
        done = self.state.budget.position(step) / self.state.budget.settings.steps
        count = len(self.stages)
        return [done < self.share * (count - number) / count for number in range(count)]

    def _set(self, trainer: Workflow) -> None:
        waiting = self.waiting(trainer.state.iteration - 1)
        for wait, parameters in zip(waiting, self.stages, strict=True):
            for parameter in parameters:
                parameter.requires_grad_(not wait)
        still = [part for wait, parts in zip(waiting, self.owners, strict=True) if wait for part in parts]
        self.frozen[:] = [*self.always, *still]
