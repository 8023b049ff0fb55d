"""The quickstart: the whole line on virtual subjects, in minutes and without data of one's own.

Weights, cohort, proof, four short trainings (two networks, each pretrained and from scratch), prediction of a
held-out subject, one page. What is there from an earlier run is used again.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from medi3d.config import load_config, load_run
from medi3d.console import console, print_rows
from medi3d.datasets.synthetic import NOTICE, VirtualSettings, write_cohort
from medi3d.engine.files import read_table
from medi3d.errors import ConfigError, WeightsError
from medi3d.models.encoders import create_encoder
from medi3d.quickstart_page import draw_curves, draw_mask, write_page
from medi3d.transfer.evaluation import summary
from medi3d.transfer.experiment import SegmentationExperiment
from medi3d.transfer.prediction import run_prediction
from medi3d.transfer.training import run_training
from medi3d.weights.catalogue import find_weights, get_row
from medi3d.weights.fetch import fetch_weights

say = partial(console.print, soft_wrap=True, highlight=False)  # paths stay whole, to be copied


@dataclass(frozen=True)
class Contender:
    """A network with published weights."""

    title: str
    name: str
    source: str
    weights: str


CONTENDERS = (
    Contender(
        "EfficientNet-Lite0 (ImageNet)",
        "lite0",
        "timm:tf_efficientnet_lite0",
        "imagenet/efficientnet-lite0",
    ),
    Contender("I3D (Kinetics-400)", "i3d", "inception_v1", "kinetics400/i3d-rgb"),
)
STARTS = {"pretrained": "full", "scratch": "original"}
"""Column of the table -> strategy."""


@dataclass(frozen=True)
class Run:
    """One of the trainings, and where it is kept."""

    contender: Contender
    start: str
    experiment: SegmentationExperiment
    folder: Path

    @property
    def title(self) -> str:
        """As in the table and the pictures."""
        return f"{self.contender.title.split(' (')[0]}, {self.start}"

    @property
    def begun(self) -> bool:
        """True if the folder holds this very training, as far as it went."""
        try:
            return load_run(self.folder) == self.experiment
        except ConfigError:
            return False

    @property
    def complete(self) -> bool:
        """True if this very training is done and judged."""
        rows = read_table(self.folder / "metrics.csv")
        done = bool(rows) and rows[-1]["step"] == self.experiment.training.steps
        return self.begun and done and (self.folder / "report.html").is_file()


def run_quickstart(config: Path, folder: Path, *, fresh: bool = False) -> list[dict[str, Any]]:
    """Do all of it, and say what is done.

    Args:
        config: of the trainings; `network.source`, `network.weights`, `strategy` and `name` are put in here.
        folder: of the runs, the masks and the page.
        fresh: train again what is there already.

    Returns:
        A row for each network: validation Dice (mean over subjects and labels), pretrained and from scratch.

    Raises:
        ConfigError: the config is no segmentation, or has an error.
        WeightsError: none of the pretrained weights can be had.
        DataError: a folder cannot be written.
    """
    begun = time.monotonic()
    with _step(1, "pretrained weights"):
        contenders = [contender for contender in CONTENDERS if _has_weights(contender)]
        if not contenders:
            raise WeightsError("no pretrained weights here, and none could be fetched: is there a network?")
    runs = _runs(contenders, config, folder)
    cohort = Path(runs[0].experiment.data.root)
    with _step(2, f"virtual subjects in {cohort}"):
        if not write_cohort(cohort, VirtualSettings(), say):
            say("there already")
    with _step(3, "inflate to 3D and prove it"):
        proofs = [_prove(contender, runs[0].experiment) for contender in contenders]
    with _step(4, f"{len(runs)} short trainings"):
        for run in runs:
            _train(run, fresh)
    with _step(5, "predict a subject that no training has seen"):
        masks = [_predict(run, cohort, folder) for run in runs]
    table = _dice_table(runs)
    with _step(6, "one page with all of it"):
        page = _page(folder, runs, masks, {"Validation Dice": table, "Proof of exactness": proofs})
    print_rows("Validation Dice, VIRTUAL subjects", table)
    say(f"{time.monotonic() - begun:.0f} s in all. Look at {page}, masks in {folder / 'masks'}")
    return table


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    begun = time.monotonic()
    say(f"[bold]{number}/6 {title}[/]")
    yield
    say(f"[dim]{number}/6 done in {time.monotonic() - begun:.0f} s[/]")


def _has_weights(contender: Contender) -> bool:
    row = get_row(contender.weights)
    try:
        path = find_weights(row)
    except WeightsError:
        try:
            path = fetch_weights(row, say)
        except WeightsError as error:
            say(f"left out: {contender.title}: {error}")
            return False
    say(f"{contender.weights}: {path}")
    return True


def _runs(contenders: list[Contender], config: Path, folder: Path) -> list[Run]:
    runs = []
    for contender in contenders:
        for start, strategy in STARTS.items():
            name = f"{contender.name}_{start}"
            weights = contender.weights if start == "pretrained" else "null"
            overrides = [f"name={name}", f"strategy={strategy}"]
            overrides += [f"network.source={contender.source}", f"network.weights={weights}"]
            experiment = load_config(config, overrides)
            if not isinstance(experiment, SegmentationExperiment):
                raise ConfigError(f"{config}: task is {experiment.task!r}; the quickstart is a segmentation")
            runs.append(Run(contender, start, experiment, folder / name))
    return runs


def _prove(contender: Contender, experiment: SegmentationExperiment) -> dict[str, Any]:
    """Inflate with the published weights; `create_encoder` refuses what is not exact."""
    network = experiment.network
    options = network.encoder_options()
    encoder: Any = create_encoder(contender.source, weights=contender.weights, **options)
    report = encoder.report.to_dict()
    counts = ", ".join(f"{name} {count}" for name, count in report["weights"]["counts"].items() if count)
    error = f"{report['max_rel_error']:.1e}"
    say(f"{contender.title}: [bold green]exact[/], worst error {error}; tensors: {counts}")
    return {"network": contender.title, "worst error (float64)": error, "published tensors": counts}


def _train(run: Run, fresh: bool) -> None:
    if run.complete and not fresh:
        say(f"{run.title}: there already, in {run.folder}")
        return
    say(f"[bold]{run.title}[/]")
    if run.folder.is_dir() and (fresh or not run.begun):
        shutil.rmtree(run.folder)
    run_training(run.experiment, run.folder, resume=True)


def _predict(run: Run, cohort: Path, folder: Path) -> Path:
    """The mask of the first held-out subject; predicted again, for a mask is quick and must fit its run."""
    image = sorted((cohort / "imagesTs").glob("*.nii.gz"))[0]
    written, failed = run_prediction(run.experiment, run.folder, [image], folder / "masks" / run.folder.name)
    if failed:
        raise ConfigError(failed[0])
    return written[0]


def _dice_table(runs: list[Run]) -> list[dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for run in runs:
        dice = summary(read_table(run.folder / "cases.csv"))["mean"]["dice"]
        table.setdefault(run.contender.title, {"network": run.contender.title})[run.start] = dice
    return list(table.values())


def _page(folder: Path, runs: list[Run], masks: list[Path], tables: dict[str, Any]) -> Path:
    plots, settings = folder / "plots", runs[0].experiment.data
    plots.mkdir(parents=True, exist_ok=True)
    curves = {run.title: read_table(run.folder / "metrics.csv") for run in runs}
    pictures = [draw_curves(curves, plots / "curves.png")]
    for run, mask in zip(runs, masks, strict=True):
        pictures.append(draw_mask(run.title, mask, settings, plots / f"{run.folder.name}.png"))
    links = {run.title: f"{run.folder.name}/report.html" for run in runs}
    return write_page(folder / "report.html", NOTICE, tables, pictures, links)
