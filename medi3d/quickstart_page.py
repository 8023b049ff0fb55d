"""The quickstart's pictures of a held-out subject."""

from pathlib import Path

from medi3d.datasets.cohort import Case, load_case
from medi3d.datasets.files import read_volume
from medi3d.datasets.volumes import VolumeSettings, to_array, to_canonical
from medi3d.engine.plots import plot_overlay


def draw_mask(title: str, mask: Path, root: Path, settings: VolumeSettings, path: Path) -> None:
    """The outlines of a mask and of the reference, on the held-out subject of `root` that they belong to."""
    image, label = root / "imagesTs" / mask.name, root / "labelsTs" / mask.name
    sample = load_case(Case(mask.name, (image,), label, mask.name), settings)
    predicted = to_array(to_canonical(read_volume(mask), sample["spacing"], label=True))
    arrays = sample["image"][0].numpy(), sample["label"][0].numpy(), predicted
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_overlay(*arrays, sample["spacing"], title, path)
