"""`medi3d doctor` and `quickstart`."""

from pathlib import Path
from typing import Annotated

import typer

from medi3d.cli.options import JsonFile, write_json


def doctor(json_file: JsonFile = None) -> None:
    """Show what works on this machine: versions, devices, operators, memory, disk, weights.

    Example: medi3d doctor
    """
    from medi3d.cli.doctor import examine
    from medi3d.console import print_rows

    findings = examine()
    print_rows("medi3d on this machine", findings)
    write_json(json_file, findings)


def quickstart(
    config: Annotated[Path, typer.Argument(help="Config of a comparison.")] = Path(
        "configs/compare/quickstart.yaml"
    ),
    out: Annotated[Path, typer.Option(help="Folder for runs, masks and page.")] = Path("runs/quickstart"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard earlier runs and train again.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Run the whole pipeline on virtual subjects in minutes: weights, proof, training, masks, one page.

    Example: medi3d quickstart
    """
    from medi3d.cli.quickstart import run_quickstart

    write_json(json_file, run_quickstart(config, out, fresh=fresh))
