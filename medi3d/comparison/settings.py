"""What is compared with what, and on which terms. What a file in `configs/compare/` describes."""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from medi3d.errors import ConfigError
from medi3d.experiment.strategies import check_strategy

Changes = dict[str, Any]
"""Part of a config that is laid over another, such as {"network": {"weights": "kinetics400/i3d-rgb"}}."""


@dataclass(frozen=True)
class GroupSettings:
    """Arms, each compared with one of them, the reference. Lists left out are those of the comparison."""

    reference: str = MISSING
    """name of the arm that the others are compared with"""
    arms: dict[str, Any] = MISSING
    """name -> what it changes of the base; an arm that says its `strategy` runs with that one alone, and
    `seed_shift` is added to its seeds (but not to those of the subsets), for a comparison with itself"""
    changes: dict[str, Any] = field(default_factory=dict)
    """what all arms of this group change of the base"""
    labels: list[int] | None = None
    strategies: list[str] | None = None
    budgets: list[str] | None = None
    """names of budgets"""


@dataclass(frozen=True)
class SearchSettings:
    """A small search for the learning rate, the same for every arm and strategy."""

    rates: list[float] = field(default_factory=list)
    """values of training.learning_rate to try; none: all arms share the base's"""
    labels: int | None = None
    """training cases in the search; null: the largest number that is compared"""
    budget: str | None = None
    """name of its budget; null: the first"""


@dataclass(frozen=True)
class Comparison:
    """The whole grid: every arm × strategy × number of labels × seed × fold × budget is one run.

    The base's `data.validation` and `data.split_seed` hold back the cases that judge. No training, no
    choice of a learning rate or of a checkpoint, and no end of a training looks at them: `tuning` further
    cases, the same for all runs, are held back for that.

    Raises:
        ConfigError: a value is not allowed; the message names its key.
    """

    name: str = MISSING
    """of the comparison, and of its folder: runs/NAME"""
    base: Any = MISSING
    """the experiment that all runs vary: a config file, relative to this one, or its content"""
    groups: dict[str, GroupSettings] = MISSING
    budgets: dict[str, Any] = MISSING
    """name -> what it changes of the section `training`"""
    changes: dict[str, Any] = field(default_factory=dict)
    """what all runs change of the base"""
    labels: list[int] = field(default_factory=lambda: [0])
    """numbers of labelled training cases, nested: the first 4 of a seed are among its first 8; 0: all"""
    strategies: list[str] = field(default_factory=lambda: ["full"])
    """of the arms that do not name theirs"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """each draws the subset of cases, the first weights and the order of samples, for all arms alike"""
    folds: int = 1
    """1: one part of the cohort judges; k: each of k parts judges once"""
    tuning: int = 5
    """cases held back to choose checkpoints and learning rates, and to see when training is flat"""
    search: SearchSettings = field(default_factory=SearchSettings)
    threads: int = 1
    """threads of each run; another number gives slightly other sums, so it belongs to the config"""
    gpus: float = 0.0
    """GPUs of each run, for the executor ray"""
    notice: str = ""
    """said first in the report"""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(f"name is {self.name!r}: letters, digits, dot, dash and underscore only")
        for key, least in (("folds", 1), ("tuning", 1), ("threads", 1), ("gpus", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key} is {getattr(self, key)}: at least {least}")
        for key in ("groups", "labels", "seeds", "budgets", "strategies"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty: name at least one")
        _check_lists("", self.labels, self.strategies)
        _check_distinct("seeds", self.seeds)
        for name, group in self.groups.items():
            self._check_group(f"groups.{name}", group)
        if self.search.budget is not None and self.search.budget not in self.budgets:
            raise ConfigError(f"search.budget is {self.search.budget!r}: one of {', '.join(self.budgets)}")

    def _check_group(self, key: str, group: GroupSettings) -> None:
        if group.reference not in group.arms:
            raise ConfigError(f"{key}.reference is {group.reference!r}: one of {', '.join(group.arms)}")
        for name in (key.split(".", 1)[1], *group.arms, *self.budgets):
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(f"{key}: {name!r}: letters, digits, dot, dash and underscore only")
        _check_lists(f"{key}.", group.labels or [], group.strategies or [])
        for budget in group.budgets or []:
            if budget not in self.budgets:
                raise ConfigError(f"{key}.budgets has {budget!r}: one of {', '.join(self.budgets)}")


def _check_lists(prefix: str, labels: list[int], strategies: list[str]) -> None:
    _check_distinct(f"{prefix}labels", labels)
    if min(labels, default=0) < 0:
        raise ConfigError(f"{prefix}labels has {min(labels)}: a number of cases, or 0 for all")
    for strategy in strategies:
        check_strategy(strategy)


def _check_distinct(key: str, values: list[int]) -> None:
    if len(set(values)) < len(values):
        raise ConfigError(f"{key} is {values}: name each once")
