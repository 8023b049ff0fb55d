"""What the command line says of itself, and what it must not load to say it."""

import subprocess
import sys

import click
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from medi3d.cli.entry import app

HEAVY = (
    "torch",
    "monai",
    "timm",
    "numpy",
    "SimpleITK",
    "nibabel",
    "torchio",
    "ignite",
    "matplotlib",
    "scipy",
)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        deeper = hasattr(command, "commands")
        found += commands(command, (*path, name)) if deeper else [(*path, name)]
    return found


COMMANDS = commands(get_command(app))


def test_the_commands_of_the_design_exist() -> None:
    names = {path[0] for path in COMMANDS}
    assert {"inflate", "verify", "inspect", "weights", "classify", "train", "evaluate", "predict"} <= names


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_an_example(path: tuple[str, ...]) -> None:
    answer = CliRunner().invoke(app, [*path, "--help"])
    assert answer.exit_code == 0
    assert f"Example: medi3d {' '.join(path)}" in " ".join(answer.output.split())


@pytest.mark.parametrize("module", ["medi3d", "medi3d.cli.entry"])
def test_help_loads_nothing_heavy(module) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_command_help_is_shown() -> None:
    answer = CliRunner().invoke(app, [])
    assert answer.exit_code == 2
    assert "Usage" in answer.output
