"""The command line: parse, call one function, print. Heavy imports stay inside the commands."""

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from medi3d.cli.experiments import compare, evaluate, prepare, pretrain, train
from medi3d.cli.features import features
from medi3d.cli.inflation import inflate, inspect, verify
from medi3d.cli.machine import doctor, quickstart
from medi3d.cli.prediction import classify, export, predict
from medi3d.cli.weights import weights_app
from medi3d.errors import Interrupted, Medi3dError, printable

app = typer.Typer(
    name="medi3d",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn any pretrained 2D or video network into a 3D encoder for CT and MRI, prove it exact, "
    "train it, and learn whether it helped.",
)

for command in (
    inflate,
    verify,
    inspect,
    prepare,
    train,
    pretrain,
    evaluate,
    predict,
    classify,
    features,
    compare,
    export,
    doctor,
    quickstart,
):
    app.command()(command)
app.add_typer(weights_app, name="weights")


def main() -> None:
    """Entry point: an expected error ends in one line and exit code 1; `--debug` shows where it came from."""
    # Threads that spin while they wait cost ten times the CPU on shared cores; torch reads this on import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv or bool(os.environ.get("MEDI3D_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except Interrupted as stop:
        typer.echo(f"medi3d: {stop}", err=True)
        raise SystemExit(128 + stop.signal) from None
    except Medi3dError as error:
        if debug:
            raise
        fail(error)
    except KeyboardInterrupt:
        typer.echo("medi3d: stopped", err=True)
        raise SystemExit(130) from None


def fail(error: Exception) -> None:
    """End the program with the error as one line on stderr."""
    typer.echo(f"medi3d: {printable(' '.join(str(error).split()))}", err=True)
    raise SystemExit(1)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medi3d {metadata.version('medi3d')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of every command."""
