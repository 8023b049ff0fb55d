"""All that training changes: what a checkpoint holds and a resumed run takes up again."""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from medi3d.engine.budget import Budget
from medi3d.engine.clock import Clock
from medi3d.engine.settings import TrainingSettings
from medi3d.errors import TrainingError, WeightsError, first_line
from medi3d.files import writing, written_aside

FORMAT = 1
"""Number of the checkpoint's layout."""

MOMENTUM = 0.9
"""Of stochastic gradient descent, as in the I3D paper, sec. 3.1."""


@dataclass
class TrainingState:
    """Network, optimiser, schedule, averaged weights, and how far the run has come.

    Random numbers need no place here: every step and every sample draws its own from (seed, number).
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    average: AveragedModel | None
    clock: Clock
    budget: Budget
    step: int = 0
    """optimiser steps done"""
    best: float = -math.inf
    """highest score of a validation"""

    @classmethod
    def create(
        cls, network: nn.Module, groups: Sequence[dict[str, Any]], settings: TrainingSettings
    ) -> "TrainingState":
        """The optimiser over `groups` (each with "name", "params" and "lr"), at the start of a run."""
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(list(groups), momentum=MOMENTUM, weight_decay=settings.weight_decay)
        else:
            optimizer = torch.optim.AdamW(list(groups), weight_decay=settings.weight_decay, fused=True)
        clock = Clock()
        budget = Budget(settings, clock)
        scheduler = LambdaLR(optimizer, budget.factor)
        average = None
        if settings.ema:
            average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        return cls(network, optimizer, scheduler, average, clock, budget)

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.budget.is_over(self.step)

    @property
    def validated(self) -> nn.Module:
        """The network that is validated and kept: the averaged one, if there is one."""
        return self.network if self.average is None else self.average.module

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each parameter group, under `lr_NAME`."""
        return {f"lr_{group['name']}": float(group["lr"]) for group in self.optimizer.param_groups}

    def save(self, path: Path) -> None:
        """Write a checkpoint from which training continues exactly."""
        content = {
            "format": FORMAT,
            "step": self.step,
            "best": self.best,
            "clock": self.clock.read(),
            "flat_at": self.budget.flat_at,
            "contract": contract_in(self.network),
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        write_checkpoint(path, content)

    def load(self, path: Path) -> None:
        """Take up the run that `path` holds.

        Raises:
            WeightsError: the file is damaged, or belongs to another network or other settings.
        """
        content = read_checkpoint(path)
        try:
            self.network.load_state_dict(content["network"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.scheduler.load_state_dict(content["scheduler"])
            if self.average is not None:
                self.average.load_state_dict(content["average"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"does not fit this run ({first_line(error)})"
            raise WeightsError(f"{path}: {reason}; resume with the config that started it") from error
        self.step, self.best = content["step"], content["best"]
        self.clock.go_on_from(content["clock"])
        self.budget.flat_at = content.get("flat_at")

    def save_network(self, path: Path, score: float) -> None:
        """Write the weights alone, of the network that is validated, with its score."""
        network = self.validated.state_dict()
        content = {"format": FORMAT, "step": self.step, "score": score, "network": network}
        content["contract"] = contract_in(self.network)
        write_checkpoint(path, content)


def contract_in(network: nn.Module) -> dict[str, Any] | None:
    """What the network's weights expect of their input: weights in a file of the user may change or go."""
    normaliser: Any = getattr(getattr(network, "encoder", None), "normaliser", None)
    return None if normaliser is None else normaliser.to_dict()


def check_finite(network: nn.Module, step: int) -> None:
    """Refuse weights that are no numbers any more.

    Raises:
        TrainingError: naming the first such parameter.
    """
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise TrainingError(
                f"after step {step} the weights {name} are not finite: lower training.learning_rate, or set "
                "training.gradient_clip"
            )


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        WeightsError: it cannot be written.
    """
    with writing(path, WeightsError, (RuntimeError,)), written_aside(path) as aside:
        torch.save(content, aside)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, read without running anything that it might contain.

    Raises:
        WeightsError: the file is missing, damaged, or no checkpoint of medi3d.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint; train first")
    try:
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                raise WeightsError(
                    f"{path}: damaged (wrong checksum of {broken}); train again, or resume from a copy"
                )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise WeightsError(f"{path}: damaged or no checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise WeightsError(f"{path}: no checkpoint of medi3d in format {FORMAT}")
    return content


def fill_network(network: nn.Module, content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fill `network` from the content of a checkpoint, and return its other facts ("step", "score").

    Args:
        network: of the architecture that was trained.
        content: from `read_checkpoint`.
        path: of the checkpoint, for messages.

    Raises:
        WeightsError: the checkpoint is of another network.
    """
    try:
        network.load_state_dict(content["network"])
    except (KeyError, TypeError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise WeightsError(f"{path}: is of another network: {' '.join(lines[1:2])}") from error
    return {key: value for key, value in content.items() if key != "network"}
