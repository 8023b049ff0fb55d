"""The quickstart: the whole pipeline on virtual subjects, in minutes, without any data.

Weights, cohort, proof, a small comparison (two networks, each pretrained and from scratch), prediction of a
held-out subject, one page. Finished steps of an earlier run are reused.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from medi3d.cli.tables import print_effects
from medi3d.comparison.compare import run_comparison
from medi3d.comparison.config import load_comparison
from medi3d.comparison.executor import LocalExecutor
from medi3d.comparison.grid import Resolve
from medi3d.comparison.report import Picture, write_comparison
from medi3d.comparison.results import Results
from medi3d.comparison.settings import Comparison
from medi3d.console import console
from medi3d.datasets.cohorts.cases import load_case
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.cohorts.virtual_subjects import VirtualSettings, write_cohort
from medi3d.datasets.images.files import read_volume
from medi3d.datasets.images.preprocessing import to_array, to_canonical
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import ConfigError, WeightsError
from medi3d.experiment.settings import Experiment, SegmentationExperiment, segmentation_of
from medi3d.experiment.tasks import build_network, build_task
from medi3d.prediction.predict import run_prediction
from medi3d.reports.plots import plot_overlay
from medi3d.weights.catalogue import find_weights, get_row
from medi3d.weights.fetch import fetch_weights

say = partial(console.print, soft_wrap=True, highlight=False)  # paths stay whole, to be copied
STEPS = 5


def run_quickstart(config: Path, folder: Path, *, fresh: bool = False) -> list[dict[str, Any]]:
    """Run every step, and report each.

    Args:
        config: of a comparison of segmentations.
        folder: of the comparison, the masks and the page.
        fresh: discard earlier runs and train again.

    Returns:
        The findings, as in `effects.csv`.

    Raises:
        ConfigError: the config is not a comparison of segmentations, or has an error.
        WeightsError: none of the pretrained weights is available.
        DataError: a folder cannot be written.
    """
    begun = time.monotonic()
    comparison, resolve = load_comparison(config)
    with _step(1, "pretrained weights"):
        comparison = with_weights(comparison, resolve)
    base = segmentation_of(resolve([comparison.changes]), str(config))
    cohort = Path(base.data.root)
    with _step(2, f"virtual subjects in {cohort}"):
        if not write_cohort(cohort, VirtualSettings(), say):
            say("there already")
    with _step(3, "inflate to 3D and prove it"):
        proofs = [_prove(experiment) for experiment in pretrained(comparison, resolve).values()]
    if fresh:
        shutil.rmtree(folder / "cells", ignore_errors=True)

    with _step(4, "compare pretrained with scratch in short trainings"):
        executor = LocalExecutor()
        results = run_comparison(comparison, resolve, folder, executor, resume=True, report=lambda *_: None)
    if results.failed:
        raise ConfigError(next(iter(results.failed.values())))
    with _step(5, "predict a subject that no training has seen; one page with all of it"):
        pictures = _predict(results, cohort, folder)
        page = write_comparison(results, folder, tables={"Proof of exactness": proofs}, pictures=pictures)
    print_effects(results)
    seconds = time.monotonic() - begun
    say(f"VIRTUAL subjects; {seconds:.0f} s in all. Look at {page}, masks in {folder / 'masks'}")
    return [finding.row() for finding in results.findings]


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    begun = time.monotonic()
    say(f"[bold]{number}/{STEPS} {title}[/]")
    yield
    say(f"[dim]{number}/{STEPS} done in {time.monotonic() - begun:.0f} s[/]")


def pretrained(comparison: Comparison, resolve: Resolve) -> dict[str, SegmentationExperiment]:
    """Group -> the experiment of its first arm with published weights."""
    found: dict[str, SegmentationExperiment] = {}
    for name, group in comparison.groups.items():
        for arm in group.arms.values():
            experiment = segmentation_of(resolve([comparison.changes, group.changes, arm or {}]), "base")
            if experiment.network.weights is not None:
                found.setdefault(name, experiment)
    return found


def with_weights(comparison: Comparison, resolve: Resolve) -> Comparison:
    """The comparison without the groups whose published weights are not available.

    Raises:
        WeightsError: none is left.
    """
    there = [name for name, arm in pretrained(comparison, resolve).items() if _has_weights(name, arm)]
    if not there:
        raise WeightsError("no pretrained weights here, and none could be fetched: is there a network?")
    return replace(comparison, groups={name: comparison.groups[name] for name in there})


def _has_weights(group: str, experiment: Experiment) -> bool:
    row = get_row(str(experiment.network.weights))
    try:
        path = find_weights(row)
    except WeightsError:
        try:
            path = fetch_weights(row, say)
        except WeightsError as error:
            say(f"left out: {group}: {error}")
            return False
    say(f"{row.name}: {path}")
    return True


def _prove(experiment: SegmentationExperiment) -> dict[str, Any]:
    """Inflate with the published weights; what is not exact is refused."""
    network: Any = build_network(experiment, build_task(experiment))
    report, weights = network.encoder.report.to_dict(), experiment.network.weights
    counts = ", ".join(f"{name} {count}" for name, count in report["weights"]["counts"].items() if count)
    error = f"{report['max_rel_error']:.1e}"
    say(f"{weights}: [bold green]exact[/], worst error {error}; tensors: {counts}")
    return {"weights": weights, "worst error (float64)": error, "published tensors": counts}


def _predict(results: Results, cohort: Path, folder: Path) -> list[Picture]:
    """Masks of the first held-out subject by every run, with a picture of each."""
    image = sorted((cohort / "imagesTs").glob("*.nii.gz"))[0]
    pictures = []
    for point in results.done:
        cell, name = results.cells[point], f"{point.group}_{point.arm}"
        run = cell.run(folder / "cells")
        written, failed = run_prediction([run], [image], folder / "masks" / name)
        if failed:
            raise ConfigError(failed[0])
        path = folder / "plots" / f"held_out_{name}.png"
        title = f"VIRTUAL subject, {point.group}: {point.arm}"
        draw_mask(title, written[0], cohort, run.volumes, path)
        caption = f"Reference green, prediction red. Its mask: {written[0].relative_to(folder)}"
        pictures.append(
            Picture(f"A subject that no training has seen, by {point.group}: {point.arm}", path, caption)
        )
    return pictures


def draw_mask(title: str, mask: Path, root: Path, settings: VolumeSettings, path: Path) -> None:
    """The outlines of a mask and of the reference, on the held-out subject of `root` that they belong to."""
    image, label = root / "imagesTs" / mask.name, root / "labelsTs" / mask.name
    sample = load_case(Case(mask.name, (image,), label, mask.name), settings)
    predicted = to_array(to_canonical(read_volume(mask), sample["spacing"], label=True))
    arrays = sample["image"][0].numpy(), sample["label"][0].numpy(), predicted
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_overlay(*arrays, sample["spacing"], title, path)
