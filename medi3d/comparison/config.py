"""YAML to `Comparison`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medi3d.comparison.grid import Resolve
from medi3d.comparison.settings import Comparison
from medi3d.errors import ConfigError
from medi3d.experiment.config import check_overrides, explain, read_yaml, to_experiment
from medi3d.experiment.settings import Experiment


def load_comparison(path: Path | str, overrides: Sequence[str] = ()) -> tuple[Comparison, Resolve]:
    """The comparison that a YAML file describes, and what makes its experiments from parts of a config.

    Raises:
        ConfigError: as `load_config`, for the file and for the base that it names.
    """
    path = Path(path)
    given = read_yaml(path)
    check_overrides(overrides)
    try:
        given.merge_with_dotlist(list(overrides))
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
