"""The scripts and what the README promises."""

import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest
from typer.main import get_command

from medi3d.cli.entry import app
from medi3d.experiment.config import load_config

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / "scripts" / name for name in ("setup", "quickstart", "test")] + [ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_can_be_run(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text()


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    answer = subprocess.run(
        ["bash", tmp_path / "scripts" / "setup"],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert "Python 3.11 or newer is needed" in answer.stderr
    assert "Python 3.9.2" in answer.stderr


def test_every_pin_is_a_plain_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)


@pytest.mark.parametrize("file", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda p: p.name)
def test_documented_commands_exist(file: Path) -> None:
    known = set(get_command(app).commands)
    used = set(re.findall(r"(?:^ {4,}|`)medi3d ([a-z]+)", file.read_text(), re.MULTILINE))
    assert used <= known


@pytest.mark.parametrize("file", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda p: p.name)
def test_documents_point_at_files_that_are_there(file: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", file.read_text())
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_the_quickstart_config_is_an_ordinary_one() -> None:
    assert load_config(ROOT / "configs" / "quickstart.yaml").task == "segmentation"


def test_the_readmes_monai_script_runs() -> None:
    torch = pytest.importorskip("torch")
    block = re.search(r"## Inside your MONAI script\n\n((?: {4}.*\n|\n)+)", (ROOT / "README.md").read_text())
    assert block
    code = textwrap.dedent(block[1]).replace(
        'weights="kinetics400/i3d-rgb"', "levels=3"
    )  # no download in a test
    code = code.replace('"cpu", 20', '"cpu", 1').replace("(96, 96, 96)", "(32, 32, 32)")
    names = {
        "loader": [{"image": torch.randn(1, 1, 32, 32, 32), "label": torch.ones(1, 1, 32, 32, 32)}],
        "volume": torch.randn(1, 1, 40, 32, 30),
    }
    exec(code, names)
    assert names["logits"].shape == (1, 3, 40, 32, 30)
