"""Clips go through the same trainer as volumes."""

import csv

import numpy as np
import pytest
import torch

from medi3d.config import load_config
from medi3d.errors import ConfigError
from medi3d.transfer.evaluation import run_evaluation, summary
from medi3d.transfer.prediction import run_prediction
from medi3d.transfer.training import run_training

CONFIG = """
task: classification
name: clips
strategy: original
data: {{root: {root}, frames: 8, side: 32, crop: 32}}
network: {{source: "timm:test_resnet", plan: planar, in_channels: 3, levels: 3, dropout: 0.0}}
training: {{steps: 40, batch_size: 4, learning_rate: 0.02, encoder_factor: 1.0, validate_every: 20}}
"""


@pytest.fixture
def clips(tmp_path):
    """Three scenes of each of two classes: bright above, or bright below."""
    av = pytest.importorskip("av")
    rng = np.random.default_rng(0)
    for name in ("above", "below"):
        for group in range(1, 4):
            path = tmp_path / "clips" / name / f"v_{name}_g{group:02d}_c01.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = rng.integers(0, 80, (10, 32, 32, 3), dtype=np.uint8)
            frames[:, slice(0, 16) if name == "above" else slice(16, 32)] += 150
            with av.open(path, "w") as container:
                stream = container.add_stream("mpeg4", rate=10)
                stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
                container.mux(stream.encode())
    return tmp_path / "clips"


def test_clips_are_learned_judged_and_reported(clips, tmp_path):
    path = tmp_path / "clips.yaml"
    path.write_text(CONFIG.format(root=clips))
    experiment, folder = load_config(path), tmp_path / "run"
    last = run_training(experiment, folder)
    assert {"top1", "top5", "val_loss"} <= set(last)
    with (folder / "cases.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["above", "below"]
    rows = run_evaluation(experiment, folder, "training")
    assert summary(rows)["mean"]["top1"] == 1.0
    assert (folder / "plots" / "confusion.png").stat().st_size > 0
    assert "top1" in (folder / "report.html").read_text()
    with pytest.raises(ConfigError, match="predict needs a segmentation"):
        run_prediction(experiment, folder, [clips], tmp_path)
    assert torch.is_grad_enabled()
