"""What is compared with what, and under which conditions: a file in `configs/compare/`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from medi3d.errors import ConfigError
from medi3d.experiment.strategies import check_strategy
from medi3d.keys import check_name

Changes = dict[str, Any]
"""Part of a config that is laid over another, such as {"network": {"weights": "kinetics400/i3d-rgb"}}."""


@dataclass(frozen=True)
class GroupSettings:
    """Arms, each compared with the reference arm. Missing lists default to the comparison's."""

    reference: str = MISSING
    """name of the arm that the others are compared with"""
    arms: dict[str, Any] = MISSING
    """name -> its changes to the base; an arm with a `strategy` runs with that one alone, and `seed_shift` is
    added to its seeds (but not to those of the subsets), to compare an arm with itself"""
    changes: dict[str, Any] = field(default_factory=dict)
    """changes to the base for all arms of this group"""
    sizes: list[int] | None = None
    strategies: list[str] | None = None
    budgets: list[str] | None = None
    """names of budgets"""


@dataclass(frozen=True)
class SearchSettings:
    """A small search for the learning rate, the same for every arm and strategy."""

    rates: list[float] = field(default_factory=list)
    """values of training.learning_rate to try; none: all arms share the base's"""
    size: int | None = None
    """training cases in the search; null: the largest size that is compared"""
    budget: str | None = None
    """name of its budget; null: the first"""


@dataclass(frozen=True)
class Comparison:
    """The whole grid: every arm × strategy × training-set size × seed × fold × budget is one run.

    The base's `data.validation` and `data.split_seed` hold out the cases that are scored. No training, no
    choice of a learning rate or of a checkpoint, and no end of a training depends on them: `tuning_cases`
    further cases, the same for all runs, are held out for that.

    Raises:
        ConfigError: a value is not allowed; the message names its key.
    """

    name: str = MISSING
    """of the comparison, and of its folder: runs/NAME"""
    base: Any = MISSING
    """the experiment that all runs vary: a config file, relative to this one, or its content"""
    groups: dict[str, GroupSettings] = MISSING
    budgets: dict[str, Any] = MISSING
    """name -> its changes to the section `training`"""
    changes: dict[str, Any] = field(default_factory=dict)
    """changes to the base for all runs"""
    sizes: list[int] = field(default_factory=lambda: [0])
    """training-set sizes: labelled cases, nested: the first 4 of a seed are among its first 8; 0: all"""
    strategies: list[str] = field(default_factory=lambda: ["full"])
    """for arms that do not name one"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """each draws the subset of cases, the first weights and the order of samples, for all arms alike"""
    folds: int = 1
    """1: one part of the cohort is held out for scoring; k: each of k parts is held out once"""
    tuning_cases: int = 5
    """cases held out to choose checkpoints and learning rates, and to detect a plateau"""
    search: SearchSettings = field(default_factory=SearchSettings)
    threads: int = 1
    """threads of each run; the number changes rounding, so it belongs to the config"""
    gpus: float = 0.0
    """GPUs of each run, for the executor ray"""
    notice: str = ""
    """shown first in the report"""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        for key, least in (("folds", 1), ("tuning_cases", 1), ("threads", 1), ("gpus", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key} is {getattr(self, key)}: at least {least}")
        for key in ("groups", "sizes", "seeds", "budgets", "strategies"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty: name at least one")
        _check_lists("", self.sizes, self.strategies)
        _check_distinct("seeds", self.seeds)
        for name, group in self.groups.items():
            self._check_group(f"groups.{name}", group)
        if self.search.budget is not None and self.search.budget not in self.budgets:
            raise ConfigError(f"search.budget is {self.search.budget!r}: one of {', '.join(self.budgets)}")

    def _check_group(self, key: str, group: GroupSettings) -> None:
        if group.reference not in group.arms:
            raise ConfigError(f"{key}.reference is {group.reference!r}: one of {', '.join(group.arms)}")
        for name in (key.split(".", 1)[1], *group.arms, *self.budgets):
            check_name(key, name)
        _check_lists(f"{key}.", group.sizes or [], group.strategies or [])
        for budget in group.budgets or []:
            if budget not in self.budgets:
                raise ConfigError(f"{key}.budgets has {budget!r}: one of {', '.join(self.budgets)}")


def _check_lists(prefix: str, sizes: list[int], strategies: list[str]) -> None:
    _check_distinct(f"{prefix}sizes", sizes)
    if min(sizes, default=0) < 0:
        raise ConfigError(f"{prefix}sizes has {min(sizes)}: a number of cases, or 0 for all")
    for strategy in strategies:
        check_strategy(strategy)


def _check_distinct(key: str, values: list[int]) -> None:
    if len(set(values)) < len(values):
        raise ConfigError(f"{key} is {values}: name each once")
