"""The plain MONAI script trains a network of medi3d on CT."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "monai_ct.py"


def test_medi3d_is_two_lines_of_it():
    code = SCRIPT.read_text().split('"""', 2)[2]
    lines = [line for line in code.splitlines() if "medi3d" in line]
    assert len(lines) == 2
    assert all("# medi3d, line" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--plain"]], ids=["medi3d", "plain"])
def test_it_trains_and_says_the_dice(more, shared, tmp_path):
    small = ["--steps=1", "--cases=2", "--held-out=1", "--batch-size=1"]
    root = ["--root", str(shared / "OpenKBP_HeadNeckCT"), "--json", str(tmp_path / "dice.json")]
    command = [sys.executable, str(SCRIPT), *small, *root, *more]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    found = json.loads((tmp_path / "dice.json").read_text())
    assert 0 <= found["dice"] <= 1
    assert list(found["organs"]) == ["Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Mandible"]
