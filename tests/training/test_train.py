"""A whole run: what it leaves behind, how it goes on, and that two processes do as one."""

import csv
import json
import os
import signal
import sys
import time

import nibabel as nib
import pytest
import torch
from ignite.engine import Events
from omegaconf import OmegaConf

from medi3d.cli.entry import main
from medi3d.engine.state import read_checkpoint
from medi3d.errors import ConfigError, DataError, Interrupted, WeightsError
from medi3d.evaluation.evaluate import run_evaluation, summary
from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run
from medi3d.training.train import run_training
from tests.processes import run_two_processes, start_command
from tests.tiny import with_handler


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory):
    """A finished run of the tiny config."""
    from tests.tiny import CONFIG

    folder = tmp_path_factory.mktemp("runs")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(root=cohort))
    run_training(Run(folder / "tiny", load_config(path)))
    return folder / "tiny"


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "cases.csv",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
        "plots/curves.png",
        "plots/overlay_worst.png",
        "log.txt",
        "report.html",
    ],
)
def test_a_run_leaves(run, name):
    assert (run / name).stat().st_size > 0


def test_tables_have_a_row_per_validation_and_per_case_and_label(run):
    metrics, cases = rows_of(run / "metrics.csv"), rows_of(run / "cases.csv")
    assert [row["step"] for row in metrics] == ["2", "4"]
    assert {"train_loss", "val_loss", "dice_low", "lr_rest", "cpu_seconds", "data_share"} <= set(metrics[0])
    assert len(cases) == 3 * 2
    assert {"hd95", "surface_dice", "reference_ml"} <= set(cases[0])
    assert float(cases[0]["reference_ml"]) == pytest.approx(8 * 8 * 4 * 2 / 1000, rel=1e-4)


def test_a_run_can_be_repeated_from_its_folder(run, config, tmp_path):
    again = tmp_path / "again"
    run_training(Run(again, Run.open(run).experiment))
    one, other = (read_checkpoint(folder / "checkpoints" / "last.pt") for folder in (run, again))
    assert all(torch.equal(value, other["network"][key]) for key, value in one["network"].items())


def test_evaluation_of_another_split(run):
    rows = run_evaluation(Run.open(run), "training")
    assert len(rows) == 5 * 2
    assert set(summary(rows)) == {"low", "high", "mean"}
    with pytest.raises(DataError, match="no labelled case in split 'test'"):
        run_evaluation(Run.open(run), "test")


@pytest.mark.parametrize("split", ["../outside", "/outside"])
def test_a_split_is_no_path(run, split):
    with pytest.raises(ConfigError, match="cannot hold a path"):
        run_evaluation(Run.open(run), split)


def test_commands_tell_what_they_did(run, cohort, tmp_path, monkeypatch, capsys):
    def medi3d(*arguments):
        monkeypatch.setattr(sys, "argv", ["medi3d", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0
        return capsys.readouterr().out

    assert "Mean over the validation cases" in medi3d("evaluate", run, "--json", tmp_path / "means.json")
    assert set(json.loads((tmp_path / "means.json").read_text())) == {"low", "high", "mean"}
    scan = cohort / "imagesTr" / "case_0.nii.gz"
    mask = medi3d("predict", run, scan, "--out", tmp_path / "masks").strip()
    assert mask == str(tmp_path / "masks" / "case_0.nii.gz")
    assert nib.load(mask).shape == nib.load(scan).shape


def test_the_report_needs_no_other_file(run):
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.split("<h2>Config")[0]


def test_a_run_is_not_overwritten(run, config):
    with pytest.raises(ConfigError, match="holds a run already; resume it with --resume"):
        run_training(Run.open(run))
    with pytest.raises(ConfigError, match=r"started with training.steps: 4, not 5; resume with the config"):
        run_training(Run(run, load_config(config, ["training.steps=5"])), resume=True)


def test_a_run_that_is_older_than_a_setting_can_be_resumed(run):
    opened, path = Run.open(run), run / "config.yaml"
    given, text = OmegaConf.load(path), path.read_text()
    del given.training["min_gain"]
    OmegaConf.save(given, path)
    opened.check(resume=True)
    path.write_text(text)


def test_a_finished_run_resumes_to_what_it_was(run):
    before = json.loads(json.dumps(rows_of(run / "metrics.csv")))
    run_training(Run.open(run), resume=True)
    assert rows_of(run / "metrics.csv") == before


def test_a_damaged_checkpoint_is_one_clear_line(run, config, tmp_path):
    experiment = load_config(config)
    folder = tmp_path / "damaged"
    run_training(Run(folder, experiment))
    checkpoint = folder / "checkpoints" / "last.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="damaged or no checkpoint"):
        run_training(Run(folder, experiment), resume=True)


def killed_then_resumed(config, runs, steps):
    """Kill a real process as soon as its first checkpoint is there, then let a second one finish."""
    command = ["train", config, f"training.steps={steps}", "--runs", runs]
    first = start_command(*command)
    checkpoint = runs / "tiny" / "checkpoints" / "last.pt"
    while not checkpoint.exists() and first.is_alive():
        time.sleep(0.01)
    first.kill()
    first.join()
    at = read_checkpoint(checkpoint)["step"]
    second = start_command(*command, "--resume")
    second.join()
    assert second.exitcode == 0
    return at


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_never_stopped(config, tmp_path):
    at = killed_then_resumed(config, tmp_path / "killed", 24)
    assert 0 < at < 24
    run_training(Run(tmp_path / "whole", load_config(config, ["training.steps=24"])))
    one, other = (
        read_checkpoint(folder / "checkpoints" / "last.pt")["network"]
        for folder in (tmp_path / "killed" / "tiny", tmp_path / "whole")
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.slow
def test_two_processes_end_with_the_loss_of_one(config, tmp_path):
    logs = run_two_processes("train", config, "--runs", tmp_path, folder=tmp_path)
    assert sum(log.count("best validation score") for log in logs) == 1
    run_training(Run(tmp_path / "alone", load_config(config)))
    tables = (rows_of(tmp_path / run / "metrics.csv") for run in ("tiny", "alone"))
    for two, one in zip(*tables, strict=True):
        assert two["step"] == one["step"]
        for column in ("train_loss", "val_loss"):
            assert float(two[column]) == pytest.approx(float(one[column]), rel=1e-4), column


def test_a_budget_of_cpu_seconds_ends_a_run_with_a_validation(config, tmp_path):
    overrides = ["training.steps=100000", "training.cpu_seconds=1.5", "training.validate_every=100000"]
    last = run_training(Run(tmp_path / "run", load_config(config, overrides)))
    assert last["training_cpu_seconds"] >= 1.5
    assert last["step"] < 1000
    assert last["lr_rest"] == pytest.approx(0, abs=1e-4)
    assert run_training(Run(tmp_path / "run", load_config(config, overrides)), resume=True) == last


def test_a_plateau_ends_a_run_and_a_resumed_one_at_the_same_step(config, tmp_path):
    plateau = ["training.schedule=plateau", "training.patience=1", "training.min_gain=1", "training.steps=50"]
    experiment = load_config(config, [*plateau, "training.validate_every=4"])
    last = run_training(Run(tmp_path / "run", experiment))
    assert last["step"] == 8 + 2  # flat at the second validation, then a quarter of the steps again
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert checkpoint["flat_at"] == 8
    assert run_training(Run(tmp_path / "run", experiment), resume=True) == last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_the_step_in_progress(config, tmp_path, monkeypatch, number):
    """And the resumed run ends with the weights of one that was not stopped."""
    undisturbed = Run(tmp_path / "undisturbed", load_config(config))
    run_training(undisturbed)
    run = Run(tmp_path / "run", undisturbed.experiment)
    with monkeypatch.context() as patch:
        with_handler(patch, Events.ITERATION_STARTED(once=3), lambda _: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match="stopped after step 3; continue with --resume") as stop:
            run_training(run)
    assert stop.value.signal == number
    assert read_checkpoint(run.last)["step"] == 3
    run_training(run, resume=True)
    ours, theirs = (read_checkpoint(one.last)["network"] for one in (run, undisturbed))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
