"""The report of a run, one self-contained page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from medi3d.engine.metrics import Row
from medi3d.experiment.run import Run
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
"""How to read the numbers, by task."""


def write_report(run: Run, tables: Mapping[str, Sequence[Row]]) -> Path:
    """Write `report.html` of a run: tables, curves, overlays, config and environment.

    Args:
        run: with its plots.
        tables: title -> rows, shown first.
    """
    metrics = read_table(run.metrics)
    plots = sorted(run.plots.glob("*.png"))
    return write_page(
        run.report,
        "run.html",
        experiment=run.experiment,
        last=metrics[-1] if metrics else None,
        tables={**tables, "Training": metrics},
        pictures=plots,
        conventions=CONVENTIONS[run.experiment.task],
        config=run.config.read_text(),
        environment=run.environment.read_text(),
    )
