"""Clips go through the same trainer as volumes."""

import csv

import pytest
import torch

from medi3d.errors import ConfigError
from medi3d.evaluation.evaluate import run_evaluation, summary
from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run
from medi3d.prediction.predict import run_prediction
from medi3d.training.train import run_training
from tests.tiny import CLIPS_CONFIG


def test_clips_are_learned_judged_and_reported(clips, tmp_path):
    path = tmp_path / "clips.yaml"
    path.write_text(CLIPS_CONFIG.format(root=clips))
    experiment, folder = load_config(path), tmp_path / "run"
    last = run_training(Run(folder, experiment))
    assert {"top1", "top5", "val_loss"} <= set(last)
    with (folder / "cases.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["above", "below"]
    rows = run_evaluation(Run(folder, experiment), "training")
    assert summary(rows)["mean"]["top1"] == 1.0
    assert (folder / "plots" / "confusion.png").stat().st_size > 0
    assert "top1" in (folder / "report.html").read_text()
    with pytest.raises(ConfigError, match="where a segmentation is needed"):
        run_prediction([Run(folder, experiment)], [clips], tmp_path)
    assert torch.is_grad_enabled()
