#!/usr/bin/env python
"""Preprocessing of volumes against nnU-Net v2, MONAI and TorchIO: cases per second.

    benchmarks/preprocessing.py --peers peers --data ../shared/data

`peers` is a folder with nnU-Net, see `volume_rivals.py`.

All contenders take turns in one process, so other load on the machine affects all; a figure is the
median over the turns, a ratio the median of the per-turn ratios.

Each contender reads image and label from NIfTI, resamples them to the same spacing,
normalises them in its own way, and writes the file that its training reads. medi3d makes the file of
`medi3d prepare`'s cache; nnU-Net calls `DefaultPreprocessor.run_case_save` with its default plans' functions
(cubic splines for images, linear ones for labels); MONAI and TorchIO interpolate images linearly and
labels by nearest neighbour, and save with `torch.save`.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from volume_rivals import Out, Peers, console, nnunet_dataset, nnunet_plans, ratio, turns, use_peers

from medi3d.cli.options import write_json

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)

WINDOW = [-1000, 1000]
SETS = {
    "Hippocampus": ("Task04_Hippocampus", "MR", (1.0, 1.0, 1.0)),
    "Hippocampus at 0.7 mm": ("Task04_Hippocampus", "MR", (0.7, 0.7, 0.7)),
    "OpenKBP at 3 mm": ("OpenKBP_HeadNeckCT", "CT", (3.0, 3.0, 3.0)),
    "OpenKBP at 2 mm": ("OpenKBP_HeadNeckCT", "CT", (2.0, 2.0, 2.0)),
}
"""Folder under the data, modality, and spacing in mm."""


def preparers(
    folder: Path, data: Path, modality: str, spacing: tuple[float, float, float]
) -> dict[str, Callable[[Any], None]]:
    """For each contender, a function from the files of a case to the file that training reads."""
    from dataclasses import replace

    import torchio as tio
    from monai import transforms as mt
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from medi3d.datasets.cohorts.cache import cache_path, load_cached
    from medi3d.datasets.cohorts.cohort import read_cohort
    from medi3d.datasets.images.settings import Normalisation, VolumeSettings

    cohort = read_cohort(data)
    labels = {name: value for name, value in cohort.labels.items() if value}
    how = Normalisation("window", window=WINDOW) if modality == "CT" else Normalisation("zscore")
    settings = VolumeSettings(str(data), modality, labels, spacing=list(spacing), normalisation=how)
    settings = replace(settings, cache=str(folder / "medi3d"))
    plans = PlansManager(nnunet_plans(spacing, (64, 64, 64), modality))
    preprocessor, dataset = DefaultPreprocessor(verbose=False), nnunet_dataset(len(labels))
    keys = ["image", "label"]
    scale = (
        mt.ScaleIntensityRanged("image", *WINDOW, -1, 1, clip=True)
        if modality == "CT"
        else mt.NormalizeIntensityd("image")
    )
    monai_steps = mt.Compose(
        [
            mt.LoadImaged(keys),
            mt.EnsureChannelFirstd(keys),
            mt.Orientationd(keys, "LPS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            mt.Spacingd(keys, pixdim=spacing[::-1], mode=("bilinear", "nearest")),
            scale,
            mt.CastToTyped(keys, (torch.float32, torch.uint8)),
        ]
    )
    tio_steps = tio.Compose(
        [
            tio.ToCanonical(),
            tio.Resample(spacing[::-1]),
            tio.RescaleIntensity((-1, 1), in_min_max=tuple(WINDOW))
            if modality == "CT"
            else tio.ZNormalization(),
        ]
    )

    def medi3d(case: Any) -> None:
        cache_path(case, settings).unlink(missing_ok=True)
        load_cached(case, settings)

    def nnunet(case: Any) -> None:
        for old in folder.glob(f"{case.name}*.b2nd"):  # nnU-Net does not overwrite them
            old.unlink()
        preprocessor.run_case_save(
            str(folder / case.name),
            [str(case.images[0])],
            str(case.label),
            plans,
            plans.get_configuration("3d_fullres"),
            dataset,
        )

    def monai(case: Any) -> None:
        made = monai_steps({"image": case.images[0], "label": case.label})
        torch.save({key: made[key] for key in keys}, folder / f"{case.name}.monai.pt")

    def torchio(case: Any) -> None:
        subject = tio.Subject(image=tio.ScalarImage(case.images[0]), label=tio.LabelMap(case.label))
        made = tio_steps(subject)
        torch.save({key: made[key].data for key in keys}, folder / f"{case.name}.tio.pt")

    return {"medi3d": medi3d, "nnU-Net": nnunet, "MONAI": monai, "TorchIO": torchio}


def each(way: Callable[[Any], None], cases: Sequence[Any]) -> None:
    for case in cases:
        way(case)


def per_second(row: dict[str, Any], who: str) -> str:
    """Cases per second of wall time, and of CPU time."""
    rates = [row["cases"] / statistics.median(row["seconds"][who][kind]) for kind in ("wall", "cpu")]
    return f"{rates[0]:.2f} ({rates[1]:.2f})"


@app.command()
def preprocessing(
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")],
    peers: Peers = None,
    cases: Annotated[int, typer.Option(min=1, help="Cases per set.")] = 6,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    sets: Annotated[str, typer.Option(help="Which sets.")] = ",".join(SETS),
    out: Out = None,
) -> None:
    """Cases per second from NIfTI to the file that training reads, one process, one thread each."""
    use_peers(peers)
    torch.set_num_threads(1)
    import SimpleITK as sitk

    from medi3d.datasets.cohorts.cohort import read_cohort

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    rows = []
    for name in sets.split(","):
        folder, modality, spacing = SETS[name]
        chosen = read_cohort(data / folder).cases[:cases]
        with tempfile.TemporaryDirectory() as place:
            ways = preparers(Path(place), data / folder, modality, spacing)
            seconds = turns({who: partial(each, way, chosen) for who, way in ways.items()}, repeats)
        rows.append({"set": name, "cases": len(chosen), "seconds": seconds})
        write_json(out, {"preprocessing": rows})
    table = Table("set", *(f"{who} cases/s (CPU)" for who in ways), "nnU-Net / medi3d", "CPU")
    for row in rows:
        ratios = [ratio(row["seconds"], "nnU-Net", "medi3d", kind) for kind in ("wall", "cpu")]
        table.add_row(row["set"], *(per_second(row, who) for who in ways), *(f"{one:.2f}" for one in ratios))
    console.print(table)


if __name__ == "__main__":
    app()
