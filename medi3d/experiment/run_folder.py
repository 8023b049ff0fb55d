"""Starting a run folder, and refusing one that holds another run."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from medi3d.engine.environment import describe
from medi3d.errors import ConfigError, DataError
from medi3d.experiment.settings import Experiment
from medi3d.files import written_aside

WITHOUT_EFFECT = ("workers", "cache_gb")
"""Keys of `training` that a resumed run may change: they do not touch the result."""


def check_folder(experiment: Experiment, folder: Path, checkpoint: Path, resume: bool) -> None:
    """Refuse a folder with a checkpoint, unless its run is to be resumed and is this one.

    Raises:
        ConfigError: as `run_training` says.
    """
    if not checkpoint.is_file():
        return
    if not resume:
        raise ConfigError(f"{folder}: holds a run already; go on with --resume, or take another name")
    defaults = OmegaConf.to_container(OmegaConf.structured(type(experiment)))  # of keys younger than the run
    there = OmegaConf.merge(defaults, OmegaConf.load(folder / "config.yaml"))
    different = _differences(OmegaConf.to_container(there), _as_container(experiment))
    for key in WITHOUT_EFFECT:
        different.pop(f"training.{key}", None)
    if different:
        key, (old, new) = next(iter(different.items()))
        raise ConfigError(
            f"{folder}: was started with {key}: {old}, not {new}; resume with the config that started it"
        )


def _differences(one: Any, other: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Path of each key whose values differ -> both values."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {key: (one, other)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*one, *other]):
        found |= _differences(one.get(name), other.get(name), f"{key}.{name}".lstrip("."))
    return found


def _as_container(experiment: Experiment) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(experiment), resolve=True)


def start_folder(experiment: Experiment, folder: Path) -> None:
    """Make a run folder, with the resolved config and the environment.

    Raises:
        DataError: it cannot be written.
    """
    try:
        for part in (folder / "checkpoints", folder / "plots"):
            part.mkdir(parents=True, exist_ok=True)
        with written_aside(folder / "config.yaml") as aside:
            aside.write_text(OmegaConf.to_yaml(OmegaConf.create(_as_container(experiment))))
        with written_aside(folder / "environment.json") as aside:
            aside.write_text(json.dumps(describe(), indent=2))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another folder") from error
