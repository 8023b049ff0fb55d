"""YAML to `Experiment` and back. Unknown keys and wrong types are refused with the path of the key."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medi3d.errors import ConfigError
from medi3d.experiment.settings import TASKS, Experiment
from medi3d.keys import check_inert


def load_resolved(path: Path) -> Experiment:
    """The experiment of a config that medi3d wrote: with no reference to resolve, so that none is followed.

    Raises:
        ConfigError: as `load_config`; or the file holds a reference such as ${oc.env:NAME}.
    """
    try:
        check_inert(str(path), OmegaConf.to_container(read_yaml(path), resolve=False))
    except ConfigError as error:
        raise ConfigError(f"{error}; medi3d did not write this config of a run") from error
    return load_config(path)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment that a YAML file describes, with `overrides` like "training.steps=200".

    `${oc.env:NAME,default}` in the file stands for an environment variable.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, missing or of the wrong type, or a
            value is not allowed; one line, with the file and the path of the key.
    """
    path = Path(path)
    given = read_yaml(path)
    check_overrides(overrides)
    try:
        given.merge_with_dotlist(list(overrides))
        return to_experiment(given)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_given(path: Path | str, overrides: Sequence[str] = ()) -> DictConfig:
    """The keys that a YAML file and `overrides` set, without defaults.

    Raises:
        ConfigError: the file is missing or not YAML, or an override is not key=value.
    """
    given = read_yaml(Path(path))
    check_overrides(overrides)
    try:
        given.merge_with_dotlist(list(overrides))
        OmegaConf.resolve(given)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    return given


def complete(given: DictConfig) -> Experiment:
    """The experiment that these keys describe, with defaults for the others.

    Raises:
        ConfigError: as `load_config`, without the file.
    """
    try:
        return to_experiment(given)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def read_yaml(path: Path) -> DictConfig:
    """The keys of a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        given = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping of `key: value`, not {type(given).__name__}")
    return given


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse an override that is not key=value.

    Raises:
        ConfigError: naming it.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r} is not an override: write key=value, such as training.steps=200")


def to_experiment(given: Any) -> Experiment:
    """Keys checked against the task that they name.

    Raises:
        ConfigError: the task is unknown, or a section is not a mapping.
    """
    task = given.get("task")
    if task not in TASKS:
        raise ConfigError(f"task is {task!r}: one of {', '.join(TASKS)}")
    schema = OmegaConf.structured(TASKS[task])
    for key in map(str, given):
        value = given._get_node(key)
        if OmegaConf.is_dict(schema._get_node(key)) and not OmegaConf.is_dict(value):
            raise ConfigError(f"{key} must be a section with keys below it, not {value}")
    experiment: Any = OmegaConf.to_object(OmegaConf.merge(schema, given))
    return experiment


def explain(error: Exception) -> str:
    """The path of the key, then OmegaConf's message on one line."""
    key, message = getattr(error, "full_key", None), _one_line(getattr(error, "msg", None) or error)
    message = re.sub(r"Key '\w+' not in '\w+'", "unknown key", message)
    message = re.sub(
        r"Structured config of type `\w+` has missing mandatory value: \w+", "is missing", message
    )
    return f"{key}: {message}" if key else message


def _one_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = [line for line in lines if not line.startswith(("full_key:", "reference_type=", "object_type="))]
    return " ".join(wanted)
