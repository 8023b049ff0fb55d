"""A run folder as a value. The file names in a run folder are spelled here and nowhere else."""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from medi3d.datasets.images.settings import VolumeSettings
from medi3d.engine.environment import describe
from medi3d.errors import ConfigError
from medi3d.experiment.config import load_resolved
from medi3d.experiment.settings import Experiment, segmentation_of
from medi3d.files import writing, written_aside

CONFIG, ENVIRONMENT, REPORT, PLOTS = "config.yaml", "environment.json", "report.html", "plots"
LARGEST = "postprocessing.json"

FOLDERS = ("root", "cache", "flow_cache")
"""Keys of `data` that are folders or files."""

WITHOUT_EFFECT = ("training.workers", "training.cache_gb", "training.checkpoint_activations")
"""Keys that a resumed run may change, since they do not affect the result."""


@dataclass(frozen=True)
class Run:
    """A run folder and the experiment in it. All paths follow the folder, wherever it lies.

    Attributes:
        folder: the run folder; it need not exist yet.
        experiment: what is, or was, trained there.
    """

    folder: Path
    experiment: Experiment

    @classmethod
    def open(cls, folder: Path | str) -> "Run":
        """The run in `folder`, with the experiment as it was resolved when the run started.

        Raises:
            ConfigError: there is no run in `folder`, or its config is damaged.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"{folder}: no run here (no {CONFIG}); train first, or give the run's folder")
        run = cls(folder, load_resolved(folder / CONFIG))
        if not run.plan.is_file():
            return run
        network = replace(run.experiment.network, plan=str(run.plan))
        return replace(run, experiment=replace(run.experiment, network=network))

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.folder / CONFIG

    @property
    def environment(self) -> Path:
        """Versions and devices, as JSON."""
        return self.folder / ENVIRONMENT

    @property
    def last(self) -> Path:
        """The checkpoint from which training resumes."""
        return self.folder / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """The weights with the highest validation score."""
        return self.folder / "checkpoints" / "best.pt"

    @property
    def metrics(self) -> Path:
        """The table of validations: a row for each."""
        return self.folder / "metrics.csv"

    @property
    def drift(self) -> Path:
        """The table of how far activations of a pretrained encoder are from those on its own data."""
        return self.folder / "drift.csv"

    @property
    def summary(self) -> Path:
        """The table of means over all folds."""
        return self.folder / "summary.csv"

    @property
    def log(self) -> Path:
        """What training reported, with times."""
        return self.folder / "log.txt"

    @property
    def plots(self) -> Path:
        """The folder of pictures."""
        return self.folder / PLOTS

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.folder / REPORT

    @property
    def encoder(self) -> Path:
        """The artifact that a pretraining leaves."""
        return self.folder / "encoder.safetensors"

    @property
    def largest(self) -> Path:
        """Which labels keep only their largest component, as JSON."""
        return self.folder / LARGEST

    @property
    def plan(self) -> Path:
        """The kernel plan, where the config names a file: a copy, since that file may change or go."""
        return self.folder / "plan.yaml"

    @property
    def finished(self) -> Path:
        """Marks a fold whose network is trained and scored."""
        return self.folder / "finished.json"

    @property
    def traceback(self) -> Path:
        """Where an unexpected error of a job is kept."""
        return self.folder / "error.txt"

    def cases(self, split: str = "validation") -> Path:
        """The table of scores by case, for a split."""
        return self.folder / ("cases.csv" if split == "validation" else f"cases_{split}.csv")

    @property
    def members(self) -> tuple["Run", ...]:
        """The runs whose networks predict together: each fold of a cross-validation, otherwise this run."""
        if not self.experiment.is_crossvalidation:
            return (self,)
        folds: Any = self.experiment
        return tuple(Run(self.folder / f"fold{k}", folds.for_fold(k)) for k in range(folds.data.folds))

    @property
    def volumes(self) -> VolumeSettings:
        """The data settings of a segmentation.

        Raises:
            ConfigError: the run is of another task.
        """
        return segmentation_of(self.experiment, str(self.folder)).data

    def check(self, *, resume: bool, ignored: Collection[str] = ()) -> None:
        """Refuse a folder that holds a checkpoint, unless its run is this one and is to be resumed.

        Args:
            resume: whether to continue what is there.
            ignored: keys that may differ, such as "data.root".

        Raises:
            ConfigError: the folder holds a run and `resume` is false, or it was started with another config.
        """
        if not any(path.is_file() for one in self.members for path in (one.last, one.best, one.finished)):
            return
        if not resume:
            raise ConfigError(
                f"{self.folder}: holds a run already; resume it with --resume, or choose another name"
            )
        if self.best.is_file() and not self.last.is_file():
            raise ConfigError(
                f"{self.folder}: holds a trained network, but no {self.last.name} to resume from; "
                "choose another name"
            )
        there = _as_container(load_resolved(self.config))  # with defaults for keys younger than the run
        different = _differences(there, _as_container(self.experiment))
        for key in (*WITHOUT_EFFECT, *ignored):
            different.pop(key, None)
        plan = plan_file(self.experiment)
        if plan is not None and self.plan.is_file():  # by its content, wherever it is now
            different.pop("network.plan", None)
            if plan.read_bytes() != self.plan.read_bytes():
                different["network.plan"] = (f"the plan in {self.plan}", f"another plan in {plan}")
        if different:
            key, (old, new) = next(iter(different.items()))
            raise ConfigError(
                f"{self.folder}: was started with {key}: {old}, not {new}; "
                "resume with the config that started it"
            )

    def start(self) -> None:
        """Make the folder, with the resolved config and the environment.

        Raises:
            DataError: it cannot be written.
        """
        start_folder(self.folder, _as_container(self.experiment), self.last.parent, self.plots)
        plan = plan_file(self.experiment)
        if plan is not None and plan != self.plan:
            with writing(self.plan), written_aside(self.plan) as aside:
                aside.write_bytes(plan.read_bytes())


def plan_file(experiment: Experiment) -> Path | None:
    """The file of the kernel plan; None for a plan by name.

    Raises:
        ConfigError: there is no such file.
    """
    plan = str(experiment.network.plan)
    if not plan.endswith((".yaml", ".yml")):
        return None
    if not Path(plan).is_file():
        raise ConfigError(f"network.plan is {plan!r}: no such file")
    return Path(plan)


def start_folder(folder: Path, config: Any, *folders: Path) -> None:
    """Make a folder with `config.yaml` and `environment.json`, and further folders.

    Raises:
        DataError: it cannot be written.
    """
    with writing(folder):
        for part in (folder, *folders):
            part.mkdir(parents=True, exist_ok=True)
        with written_aside(folder / CONFIG) as aside:
            aside.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        with written_aside(folder / ENVIRONMENT) as aside:
            aside.write_text(json.dumps(describe(), indent=2))


def _differences(one: Any, other: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Path of each key whose values differ -> both values."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {key: (one, other)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*one, *other]):
        found |= _differences(one.get(name), other.get(name), f"{key}.{name}".lstrip("."))
    return found


def _as_container(experiment: Experiment) -> Any:
    return _absolute(OmegaConf.to_container(OmegaConf.structured(experiment), resolve=True))


def _absolute(config: Any) -> Any:
    """Folders of data by their whole path, so that a run can be evaluated from any folder."""
    data = config["data"]
    for key in set(FOLDERS) & set(data):
        if data[key]:
            data[key] = str(Path(data[key]).absolute())
    return config
