"""What commit 715e80b left behind works: runs, a comparison, an artifact and a bundle, by its own code."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from medi3d.engine.state import read_checkpoint
from tests.tiny import CONFIG, write_cohort

COMMIT = "715e80b345e97be8dafa8163cdada647697378b5"
ROOT = Path(__file__).parent.parent
COMPARISON = {
    "name": "compared",
    "groups": {
        "unet": {
            "reference": "plain",
            "arms": {"plain": {}, "wide": {"network": {"decoder_channels": [8] * 3}}},
        }
    },
    "labels": [2],
    "seeds": [0],
    "tuning": 1,
    "strategies": ["original"],
    "budgets": {"short": {"steps": 1, "validate_every": 1}},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A folder of what the old code made."""
    folder = tmp_path_factory.mktemp("old")
    packed = subprocess.run(["git", "archive", COMMIT, "medi3d"], cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        pytest.skip(f"no history here: commit {COMMIT[:7]} is not in this checkout")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder / "code", filter="data")
    cohort = write_cohort(folder / "cohort")
    (folder / "tiny.yaml").write_text(CONFIG.format(root=cohort))
    base = yaml.safe_load(CONFIG.format(root=cohort))
    (folder / "compare.yaml").write_text(yaml.safe_dump(COMPARISON | {"base": base}))
    subprocess.run(
        [sys.executable, "-P", ROOT / "tests" / "old_artefacts.py", folder],
        env=os.environ | {"PYTHONPATH": str(folder / "code")},
        cwd=folder,
        check=True,
    )
    return folder


@pytest.fixture
def scan(old) -> Path:
    return old / "cohort" / "imagesTr" / "case_0.nii.gz"


def mask(folder: Path) -> bytes:
    return (folder / "case_0.nii.gz").read_bytes()


def scores(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{key: cell for key, cell in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["whole", "folds"])
def test_its_masks_are_the_same_byte_by_byte(old, scan, medi3d, tmp_path, name):
    code, _, err = medi3d("predict", old / "runs" / name, scan, "--out", tmp_path)
    assert code == 0, err
    assert mask(tmp_path) == mask(old / "masks" / name)


def test_a_run_that_was_moved_gives_the_same_masks(old, scan, medi3d, tmp_path):
    moved = shutil.copytree(old / "runs" / "whole", tmp_path / "copy").rename(tmp_path / "elsewhere")
    code, _, err = medi3d("predict", moved, scan, "--out", tmp_path / "masks")
    assert code == 0, err
    assert mask(tmp_path / "masks") == mask(old / "masks" / "whole")


@pytest.mark.parametrize("name", ["whole", "folds"])
def test_its_scores_are_the_same(old, medi3d, tmp_path, name):
    copy = shutil.copytree(old / "runs" / name, tmp_path / name)
    (copy / "cases.csv").unlink()
    code, _, err = medi3d("evaluate", copy)
    assert code == 0, err
    assert scores(copy / "cases.csv") == scores(old / "runs" / name / "cases.csv")


def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(old, medi3d, tmp_path):
    copy = shutil.copytree(old / "runs" / "interrupted", tmp_path / "interrupted")
    assert read_checkpoint(copy / "checkpoints" / "last.pt")["step"] == 2
    code, _, err = medi3d("train", old / "tiny.yaml", "name=interrupted", "--runs", tmp_path, "--resume")
    assert code == 0, err
    ends = [read_checkpoint(run / "checkpoints" / "last.pt") for run in (copy, old / "runs" / "whole")]
    assert [end["step"] for end in ends] == [4, 4]
    assert all(torch.equal(tensor, ends[1]["network"][key]) for key, tensor in ends[0]["network"].items())


def test_its_artifact_is_proven_again(old, medi3d, tmp_path):
    code, _, err = medi3d("verify", old / "encoder.safetensors", "--json", tmp_path / "proof.json")
    assert code == 0, err
    assert json.loads((tmp_path / "proof.json").read_text())["max_rel_error"] <= 1e-9


def test_its_comparison_keeps_what_is_done_and_computes_what_is_not(old, medi3d, tmp_path):
    runs = old / "runs"
    (kept,) = (runs / "compared" / "cells").iterdir()
    before = (kept / "result.json").stat().st_mtime_ns
    code, _, err = medi3d(
        "compare", old / "compare.yaml", "--runs", runs, "--resume", "--json", tmp_path / "found.json"
    )
    assert code == 0, err
    cells = list((runs / "compared" / "cells").iterdir())
    assert len(cells) == 2
    assert all((cell / "result.json").is_file() for cell in cells)
    assert (kept / "result.json").stat().st_mtime_ns == before
    assert len(json.loads((tmp_path / "found.json").read_text())["effects"]) == 1


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_its_bundle_runs(old, scan, tmp_path, monkeypatch):
    pytest.importorskip("fire", reason="MONAI's bundle commands need it")
    from monai.bundle import run

    monkeypatch.chdir(old / "bundle")
    config = str(old / "bundle" / "configs" / "inference.json")
    run(config_file=config, bundle_root=".", inputs=[str(scan)], output_dir=str(tmp_path))
    assert mask(tmp_path) == mask(old / "masks" / "whole")
