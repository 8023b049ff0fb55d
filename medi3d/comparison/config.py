"""YAML to `Comparison`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medi3d.comparison.grid import Resolve
from medi3d.comparison.settings import Comparison
from medi3d.engine.log import log
from medi3d.errors import ConfigError
from medi3d.experiment.config import check_overrides, explain, read_yaml, to_experiment
from medi3d.experiment.settings import Experiment

OLD_KEYS = {"labels": "sizes", "tuning": "tuning_cases"}
"""Keys of a comparison before version 0.2 -> their names now."""


def load_comparison(path: Path | str, overrides: Sequence[str] = ()) -> tuple[Comparison, Resolve]:
    """The comparison that a YAML file describes, and a function that builds its experiments.

    Raises:
        ConfigError: as `load_config`, for the file and for the base that it names.
    """
    path = Path(path)
    given = read_yaml(path)
    check_overrides(overrides)
    try:
        given.merge_with_dotlist(list(overrides))
        _rename_old_keys(given)
        comparison: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Comparison), given))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    inline = isinstance(comparison.base, dict)
    base = OmegaConf.create(comparison.base) if inline else read_yaml(path.parent / str(comparison.base))

    def resolve(changes: Sequence[Mapping[str, Any]]) -> Experiment:
        try:
            return to_experiment(OmegaConf.merge(base, *changes))
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error)) from error

    return comparison, resolve


def _rename_old_keys(given: DictConfig) -> None:
    """Rename the keys of older configs, and log it."""
    groups = given.get("groups")
    named = groups.values() if isinstance(groups, DictConfig) else ()
    for section in (given, *(group for group in named if isinstance(group, DictConfig))):
        _rename(section, OLD_KEYS)
    if isinstance(given.get("search"), DictConfig):
        _rename(given.search, {"labels": "size"})


def _rename(section: DictConfig, names: Mapping[str, str]) -> None:
    for old, new in names.items():
        if old in section:
            log.info(f"{old} of a comparison is called {new} now")
            section[new] = section.pop(old)
