from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from medi3d.datasets.clips.clips import to_range
from medi3d.datasets.clips.frames import read_frames
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.errors import DataError, SourceError, WeightsError
from medi3d.models.video import published_classifier as classify
from medi3d.models.video.published_classifier import build_published_classifier, classify_clip
from medi3d.prediction.classify import classify_file

PAIR = "kinetics400/i3d-rgb+kinetics400/i3d-flow"


class Constant(nn.Module):
    """Gives the same logits whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, clip):
        return self.logits


@pytest.fixture
def weights(shared, monkeypatch):
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(shared / "weights"))


@pytest.mark.parametrize(
    "logits", [[[0.0, 2.0, 1.0]], [[[-1.0, 1.0], [1.0, 3.0], [1.0, 1.0]]]], ids=["(B, C)", "(B, C, T)"]
)
def test_classes_are_named_likeliest_first_with_logits_averaged_over_time(logits):
    named = classify_clip(Constant(logits), torch.zeros(3, 8, 4, 4), ["a", "b", "c"], top=2)
    expected = torch.tensor([0.0, 2.0, 1.0]).softmax(0)
    assert named == [("b", pytest.approx(float(expected[1]))), ("c", pytest.approx(float(expected[2])))]


def test_no_more_classes_are_named_than_there_are():
    assert len(classify_clip(Constant([[0.0, 1.0]]), torch.zeros(3, 8, 4, 4), ["a", "b"], top=5)) == 2


@pytest.mark.slow
def test_the_cricket_clips_logits_are_those_of_the_published_network(shared, weights):
    # 83.24 is what the Flax port of the authors' network and a plain TensorFlow-style port both give here
    frames = read_frames(shared / "i3d_published" / "v_CricketShot_g04_c01_rgb.gif")
    network, _ = build_published_classifier("kinetics400/i3d-rgb")
    with torch.inference_mode():
        logits = network(to_range(frames).unsqueeze(0)).mean(dim=2)
    assert logits.norm().item() == pytest.approx(83.24, rel=0.01)


@pytest.mark.slow
def test_the_cricket_clip_is_playing_cricket(shared, weights):
    named = classify_file(
        shared / "i3d_published" / "v_CricketShot_g04_c01_rgb.gif", "kinetics400/i3d-rgb", top=5
    )
    assert [len(named), named[0][0]] == [5, "playing cricket"]
    assert named[0][1] == pytest.approx(0.9886, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("imagenet/efficientnet-lite0", WeightsError, "come without class names"),
        ("kinetics400/i3d-flow", WeightsError, "i3d-flow are not on this machine"),
        (PAIR, WeightsError, "i3d-flow are not on this machine"),
        (
            "kinetics400/i3d-flow+kinetics400/i3d-rgb",
            SourceError,
            "two streams must be RGB.FLOW, in this order",
        ),
        ("medicalnet/resnet10", SourceError, "are not for a network of clips"),
        ("nothing", WeightsError, "unknown weights"),
    ],
)
def test_weights_that_cannot_name_a_clip_are_refused(shared, weights, name, error, message):
    with pytest.raises(error, match=message):
        classify_file(shared / "misc_videos" / "mmaction2__part_0.mp4", name)


class Means(nn.Module):
    """Three logits at each moment: the mean of all channels, of the first and of the last."""

    def forward(self, clip):
        seen = clip.mean(dim=(3, 4))
        return torch.stack([seen.mean(dim=1), seen[:, 0], seen[:, -1]], dim=1)


def test_logits_of_two_streams_are_added_and_flow_is_computed(monkeypatch, encode, tmp_path):
    monkeypatch.setattr(classify, "_build_stream", lambda name: (Means(), ["all", "first", "last"]))
    monkeypatch.setattr(classify, "find_weights", lambda row: None)
    monkeypatch.setattr("medi3d.prediction.classify.ClipSettings", partial(ClipSettings, side=32, crop=32))
    monkeypatch.setenv("MEDI3D_CACHE", str(tmp_path))
    clip = torch.randn(1, 5, 4, 8, 8)
    network, _ = build_published_classifier(PAIR)
    assert torch.allclose(network(clip), Means()(clip[:, :3]) + Means()(clip[:, 3:]))
    path = encode([np.full((40, 48, 3), 10 * t, np.uint8) for t in range(3)])
    assert len(classify_file(path, PAIR)) == 3
    assert list(tmp_path.rglob("flow/*/*.npz"))


def test_a_damaged_clip_is_refused_before_the_network_is_built(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no clip")
    with pytest.raises(DataError, match="not a whole clip"):
        classify_file(tmp_path / "clip.mp4", "kinetics400/i3d-rgb")
