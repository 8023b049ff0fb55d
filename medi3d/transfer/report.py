"""A run on one page that needs no other file: `report.html`."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader

from medi3d.engine.files import read_table, written_aside
from medi3d.engine.metrics import Row
from medi3d.transfer.experiment import Experiment

CONVENTIONS = {
    "segmentation": "Dice, HD95 (mm) and surface Dice by label, on the grid of the scans. A label that "
    "neither prediction nor reference has counts as Dice 1, HD95 0 and surface Dice 1; one that only one of "
    "them has as Dice 0, HD95 = diagonal of the volume and surface Dice 0. No case is left out of a mean.",
    "classification": "top1, top5: share of clips whose right class is the first, or among the first five.",
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
    page = (
        Environment(loader=PackageLoader("medi3d.transfer", ""), autoescape=True)
        .get_template("report.html")
        .render(
            experiment=experiment,
            last=metrics[-1] if metrics else None,
            tables={**tables, "Training": metrics},
            pictures={path.stem: base64.b64encode(path.read_bytes()).decode() for path in plots},
            conventions=CONVENTIONS[experiment.task],
            config=(folder / "config.yaml").read_text(),
            environment=(folder / "environment.json").read_text(),
        )
    )
    path = folder / "report.html"
    with written_aside(path) as aside:
        aside.write_text(page)
    return path
