"""Makes what commit 715e80b leaves behind. Runs with that commit's package: `python old_artefacts.py FOLDER`.

FOLDER holds `cohort` and `compare.yaml`, and gets runs, a comparison, an artifact, a bundle and masks.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from ignite.engine import Events
from matplotlib.figure import Figure
from medi3d.config import load_comparison
from medi3d.transfer.cell import run_cell
from medi3d.transfer.compare import run_comparison

from medi3d import cli
from medi3d.transfer import training

KILLED_AT = 3
"""The step at which the interrupted run ends; its last checkpoint is of step 2."""


def medi3d(*arguments: object) -> int:
    sys.argv = ["medi3d", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def done(*arguments: object) -> None:
    assert medi3d(*arguments) == 0, arguments


def interrupted(*arguments: object) -> None:
    """A training that Ctrl-C ends."""
    build = training.build_trainer

    def kill(trainer: object) -> None:
        raise KeyboardInterrupt

    def built(*given: object, **options: object) -> object:
        trainer = build(*given, **options)
        trainer.add_event_handler(Events.ITERATION_STARTED(once=KILLED_AT), kill)
        return trainer

    training.build_trainer = built
    assert medi3d(*arguments) == 130
    training.build_trainer = build


def in_turn(cells: Sequence[Any], folder: Path) -> Iterator[tuple[Any, str | None]]:
    """An executor without processes."""
    for cell in cells:
        yield cell, run_cell(cell, folder / cell.id)


def compared(folder: Path) -> None:
    """A comparison of two runs of which one is lost."""
    loaded = load_comparison(folder / "compare.yaml")
    name = yaml.safe_load((folder / "compare.yaml").read_text())["name"]
    target = folder / "runs" / name
    run_comparison(*loaded, target, in_turn)
    lost = next(cell for cell in sorted((target / "cells").iterdir()) if "wide" in cell.name)
    shutil.rmtree(lost)


def main(folder: Path) -> None:
    Figure.savefig = lambda self, path, **options: Path(path).write_bytes(b"no picture")
    runs, scan = folder / "runs", folder / "cohort" / "imagesTr" / "case_0.nii.gz"
    train = ["train", folder / "tiny.yaml", "--runs", runs]
    done(*train, "name=whole")
    interrupted(*train, "name=interrupted")
    done(*train, "name=folds", "training.steps=1", "data.folds=2", "data.fold=all")
    for name in ("whole", "folds"):
        done("predict", runs / name, scan, "--out", folder / "masks" / name)
    done("export", runs / "whole", "--to", "bundle", "--out", folder / "bundle")
    done("inflate", "timm:test_resnet", "--out", folder / "encoder.safetensors")
    compared(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
