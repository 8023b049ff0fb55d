"""Prepare a cohort: check and describe every case, choose what the config leaves open, fill the cache."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from medi3d.console import console, print_rows
from medi3d.datasets.clips.clips import read_clip_list
from medi3d.datasets.clips.flow import fill_cache as fill_flow
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.datasets.cohorts.cache import fill_cache
from medi3d.datasets.cohorts.cohort import Case, read_cohort
from medi3d.datasets.cohorts.splits import without_tests
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import ConfigError, DataError
from medi3d.experiment.config import complete, read_given
from medi3d.experiment.settings import SegmentationExperiment
from medi3d.files import writing, written_aside
from medi3d.inflation.plan import KernelPlan
from medi3d.planning.choices import LITTLE, Choice, Kept, plan_data, spare_labels
from medi3d.planning.early import add, early_problems, flat, plan_listed
from medi3d.planning.fingerprint import Fingerprint, examine_cohort, gather
from medi3d.planning.grid_loss import kept_by_grid
from medi3d.planning.modality import beyond_window, plan_channels
from medi3d.planning.patch_size import plan_patch


def run_prepare(
    config: Path, overrides: list[str], out: Path | None, *, memory_gb: float, workers: int
) -> dict[str, Any]:
    """Prepare the cohort of a segmentation config; for a config that classifies clips, compute their flow.

    Writes into `out`: `fingerprint.json`, `choices.json` (each with its reason, and what labels lose on the
    chosen grid), `config.yaml` (complete, for `medi3d train`), a plan if slices are thick, and
    `cache/` with every case in the form that the network takes.

    Args:
        config: needs `data.root`; its keys are kept, missing ones are chosen.
        overrides: "key=value" pairs that override the config.
        out: the folder; prepared/NAME if None.
        memory_gb: memory limit for a training step on the training device.
        workers: number of reading processes.

    Returns:
        The fingerprint, the choices, what labels keep on the grid, and the config's path.

    Raises:
        ConfigError: the config is of another task, or lacks what cannot be chosen.
        DataError: cases are damaged; all are named and nothing is cached.
    """
    given = read_given(config, overrides)
    if given.get("task") == "classification":
        return _prepare_flow(config, complete(given), workers)
    if given.get("task", "segmentation") != "segmentation" or not OmegaConf.select(given, "data.root"):
        raise ConfigError(f"{config}: prepare needs task: segmentation and data.root, the cohort")
    given.task = "segmentation"
    given.setdefault("name", config.stem)
    folder = out or Path("prepared") / str(given.name)
    cohort = read_cohort(given.data.root)
    listed, problems = plan_listed(cohort, flat(given))
    add(given, listed)
    problems += early_problems(given, cohort)
    if problems:
        _show_problems(problems)
        raise DataError(f"{len(problems)} problems, each named above; the first: {problems[0]}")
    cases = without_tests(cohort.cases)  # test cases must not influence the choices
    fingerprint = _examine(cases, _provisional(given), workers)
    _write(folder / "fingerprint.json", json.dumps(fingerprint.to_dict(), indent=2))
    _show(fingerprint)
    if fingerprint.problems:
        raise DataError(
            f"{len(fingerprint.problems)} problems in {given.data.root}, each named above and in "
            f"{folder / 'fingerprint.json'}; the first: {fingerprint.problems[0]}"
        )

    @cache
    def kept_by(spacing: tuple[float, ...]) -> Kept:
        settings = replace(_provisional(given), spacing=list(spacing))
        with console.status("looking at what labels lose on the grid"):
            return kept_by_grid(cases, settings, workers)

    intensities, remarks = plan_channels(fingerprint, flat(given), cohort.channels, int(given.data.channels))
    _remark(remarks)
    experiment, choices = _choose(given, fingerprint, intensities, folder, memory_gb, kept_by)
    choices = listed + choices
    rows = [{"key": c.key, "chosen": str(c.value), "because": c.why} for c in choices]
    print_rows("Chosen; give key=value to have it otherwise", rows)
    kept = kept_by(tuple(experiment.data.spacing)) if experiment.data.spacing else {}
    _show_kept(kept)
    chosen = {
        "choices": [vars(choice) for choice in choices],
        "remarks": remarks,
        "labels_kept_by_grid": kept,
    }
    _write(folder / "choices.json", json.dumps(chosen, indent=2))
    _fill(cases, experiment.data, workers)
    _write(folder / "config.yaml", OmegaConf.to_yaml(given))
    console.print(f"ready: medi3d train {folder / 'config.yaml'}", soft_wrap=True, highlight=False)
    return {
        "fingerprint": fingerprint.to_dict(),
        **chosen,
        "config": str(folder / "config.yaml"),
    }


def _prepare_flow(config: Path, experiment: Any, workers: int) -> dict[str, Any]:
    """Fill the flow cache; existing entries are kept."""
    settings: ClipSettings = experiment.data
    if settings.streams == "rgb":
        raise ConfigError(f"{config}: data.streams is rgb: prepare computes only flow; run train directly")
    paths = [clip.path for clip in read_clip_list(settings).clips]

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    seen: dict[str, Any] = {"side": settings.side, "keep": settings.crop, "rate": settings.rate}
    damaged = fill_flow(paths, settings.flow_cache or None, processes=workers, say=say, **seen)
    if damaged and not settings.skip_damaged:
        raise DataError(f"{len(damaged)} of {len(paths)} clips have no flow, each named above: {damaged[0]}")
    return {"clips": len(paths), "damaged": damaged}


def default_memory_gb() -> float:
    """85 % of a GPU's memory; without a GPU half of the free main memory, at most 8 GB."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return 0.85 * torch.cuda.get_device_properties(0).total_memory / 2**30
    return min(8.0, psutil.virtual_memory().available / 2**31)


def _provisional(given: DictConfig) -> VolumeSettings:
    """Settings that suffice to read cases: modality and normalisation do not matter yet."""
    keys = ("labels", "channels", "empty_labels", "overlaps", "nan", "missing_channels")
    data = {key: given.data[key] for key in keys if key in given.data}
    return VolumeSettings(str(given.data.root), "MR", **OmegaConf.to_container(OmegaConf.create(data)))  # type: ignore[arg-type]


def _examine(cases: Sequence[Case], settings: VolumeSettings, workers: int) -> Fingerprint:
    results = examine_cohort(cases, settings, workers)
    return gather(list(_watched(results, "examining", len(cases))))


def _choose(
    given: DictConfig,
    fingerprint: Fingerprint,
    intensities: Sequence[Choice],
    folder: Path,
    memory_gb: float,
    kept_by: Callable[[tuple[float, ...]], Kept],
) -> tuple[SegmentationExperiment, list[Choice]]:
    """Complete `given`; return the experiment that it then describes, and the choices."""
    labels = [str(name) for name in given.data.labels]
    choices = [*intensities, *plan_data(fingerprint, flat(given), labels)]
    choices = spare_labels(choices, fingerprint, lambda spacing: kept_by(tuple(spacing)))
    choices = [choice for choice in choices if choice.key not in flat(given)]
    plans = [choice for choice in choices if choice.key == "network.plan"]
    if plans:
        plan = KernelPlan.from_spacing(plans[0].value["from_spacing"])
        _write(folder / "plan.yaml", OmegaConf.to_yaml(OmegaConf.create(plan.to_dict())))
        choices[choices.index(plans[0])] = replace(plans[0], value=str(folder / "plan.yaml"))
    choices.append(Choice("data.cache", str(folder / "cache"), "cases are read and resampled once"))
    add(given, choices)
    experiment: Any = complete(given)
    beyond = beyond_window(fingerprint, experiment.data)
    if beyond:
        _show_problems(beyond)
        raise DataError(f"{len(beyond)} problems, each named above; the first: {beyond[0]}")
    if OmegaConf.select(given, "data.patch") is None:
        with console.status("running training steps, to find the largest patch that memory allows"):
            patch = plan_patch(experiment, fingerprint, memory_gb * 2**30)
        add(given, patch)
        choices += patch
        experiment = complete(given)
    return experiment, choices


def _fill(cases: Sequence[Case], settings: VolumeSettings, workers: int) -> None:
    results = fill_cache(cases, settings, workers)
    problems = [line for line in _watched(results, "resampling", len(cases)) if line]
    if problems:
        raise DataError(f"{len(problems)} cases cannot be prepared: {'; '.join(sorted(problems))}")


def _watched(results: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    return track(results, what, total=total, console=console, disable=not console.is_terminal)


def _show_problems(problems: Sequence[str]) -> None:
    for problem in problems:
        console.print(problem, style="red", soft_wrap=True, highlight=False, markup=False)


def _remark(remarks: Sequence[str]) -> None:
    for remark in remarks:
        console.print(remark, style="yellow", soft_wrap=True, highlight=False, markup=False)


def _show(fingerprint: Fingerprint) -> None:
    """Print the problems, and the lowest, median and highest value of each fact."""
    _show_problems(fingerprint.problems)
    cases = fingerprint.cases
    if not cases:
        return
    columns: dict[str, list[float]] = {}
    for axis, name in enumerate(("depth", "height", "width")):
        columns[f"{name}, voxels"] = [case.shape[axis] for case in cases]
        columns[f"{name} of a voxel, mm"] = [case.spacing[axis] for case in cases]
    columns["lowest intensity"] = [case.intensities[0]["low"] for case in cases]
    columns["highest intensity"] = [case.intensities[0]["high"] for case in cases]
    labelled = [case for case in cases if case.millilitres]
    for name in labelled[0].millilitres if labelled else ():
        columns[f"{name}, ml"] = [case.millilitres[name] for case in labelled]
        columns[f"{name}, pieces"] = [case.pieces[name] for case in labelled]
    rows = [
        {
            "of each case": name,
            "lowest": f"{min(v):.4g}",
            "median": f"{median(v):.4g}",
            "highest": f"{max(v):.4g}",
        }
        for name, v in columns.items()
    ]
    files = ", ".join(sorted({case.orientation for case in cases}))
    print_rows(f"{len(cases)} cases, {len(labelled)} with labels; axes in the files: {files}", rows)


def _show_kept(kept: Kept) -> None:
    """Print the Dice of labels with themselves after resampling and back; warn where much is lost."""
    if not kept:
        return
    rows = [{"label": n, "mean": f"{v['mean']:.3f}", "worst": f"{v['worst']:.3f}"} for n, v in kept.items()]
    print_rows("Dice onto the grid and back", rows)
    low = [f"{name} {values['mean']:.3f}" for name, values in kept.items() if values["mean"] < LITTLE]
    if low:
        console.print(
            f"little is kept of {', '.join(low)}: give a finer data.spacing=[D,H,W], or data.spacing=null, "
            "which keeps each scan's own grid",
            style="yellow",
            soft_wrap=True,
            highlight=False,
        )


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_text(text)
