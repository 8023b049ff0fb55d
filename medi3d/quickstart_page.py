"""Pictures and page of the quickstart."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from medi3d.datasets.cohort import Case, load_case
from medi3d.datasets.files import read_volume
from medi3d.datasets.volumes import VolumeSettings, to_array, to_canonical
from medi3d.engine.files import written_aside
from medi3d.engine.metrics import Row
from medi3d.engine.plots import plot_overlay


def draw_curves(runs: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Validation Dice over the steps, a line for each run; rows as in `metrics.csv`."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for number, (title, rows) in enumerate(runs.items()):  # pretrained solid, scratch dashed, as listed
        steps, dice = [row["step"] for row in rows], [row["dice"] for row in rows]
        axes.plot(steps, dice, f"C{number // 2}{'.--' if number % 2 else '.-'}", label=title)
    axes.set(xlabel="step", ylabel="validation Dice, virtual subjects", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=110)
    return path


def draw_mask(title: str, mask: Path, settings: VolumeSettings, path: Path) -> Path:
    """The outlines of a mask in `masks/RUN/` and of the reference, on the held-out subject they belong to."""
    root = Path(settings.root)
    image, label = root / "imagesTs" / mask.name, root / "labelsTs" / mask.name
    sample = load_case(Case(mask.name, (image,), label, mask.name), settings)
    predicted = to_array(to_canonical(read_volume(mask), sample["spacing"], label=True))
    arrays = sample["image"][0].numpy(), sample["label"][0].numpy(), predicted
    plot_overlay(*arrays, sample["spacing"], f"VIRTUAL subject, {title}", path)
    return path


def write_page(
    path: Path,
    notice: str,
    tables: Mapping[str, Sequence[Row]],
    pictures: Sequence[Path],
    links: Mapping[str, str],
) -> Path:
    """Write an HTML page that needs no other file, but links to the reports of the runs.

    Args:
        path: of the page.
        notice: what the images are, said first.
        tables: title -> rows with the same columns.
        pictures: PNGs, embedded.
        links: title -> page, relative to `path`.
    """
    page = (
        Environment(loader=PackageLoader("medi3d", ""), autoescape=True)
        .get_template("quickstart.html")
        .render(
            notice=notice,
            tables=tables,
            pictures={picture.stem: base64.b64encode(picture.read_bytes()).decode() for picture in pictures},
            links=links,
        )
    )
    with written_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path
