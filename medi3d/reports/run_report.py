"""A run on one page that needs no other file: `report.html`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from medi3d.engine.metrics import Row
from medi3d.experiment.settings import Experiment
from medi3d.files import read_table
from medi3d.reports.page import write_page

CONVENTIONS = {
    "segmentation": "Dice, HD95 (mm) and surface Dice by label, on the grid of the scans. A label that "
    "neither prediction nor reference has counts as Dice 1, HD95 0 and surface Dice 1; one that only one of "
    "them has as Dice 0, HD95 = diagonal of the volume and surface Dice 0. No case is left out of a mean.",
    "classification": "top1, top5: share of clips whose right class is the first, or among the first five.",
    "pretraining": "explained: part of the variance of the hidden or damaged voxels that was restored, on "
    "volumes held back from the pretext (1: all, 0: no better than their mean); dice: mean over the labels.",
}
"""How the numbers are to be read, by task."""


def write_report(experiment: Experiment, folder: Path, tables: Mapping[str, Sequence[Row]]) -> Path:
    """Write `report.html`: tables, curves, overlays, config and environment of the run in `folder`.

    Args:
        experiment: of the run.
        folder: the run folder, with its plots.
        tables: title -> rows, shown first.
    """
    metrics = read_table(folder / "metrics.csv")
    plots = sorted((folder / "plots").glob("*.png"))
    return write_page(
        folder / "report.html",
        "report.html",
        experiment=experiment,
        last=metrics[-1] if metrics else None,
        tables={**tables, "Training": metrics},
        pictures=plots,
        conventions=CONVENTIONS[experiment.task],
        config=(folder / "config.yaml").read_text(),
        environment=(folder / "environment.json").read_text(),
    )
