import pytest
import torch
from torch import nn

from medi3d.datasets.clips import to_range
from medi3d.datasets.frames import read_frames
from medi3d.errors import DataError, WeightsError
from medi3d.models.classify import build_published_classifier, classify_clip
from medi3d.transfer.classify import classify_file


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
        ("kinetics400/i3d-flow", DataError, "take optical flow"),
        ("nothing", WeightsError, "unknown weights"),
    ],
)
def test_weights_that_cannot_name_a_clip_are_refused(shared, name, error, message):
    with pytest.raises(error, match=message):
        classify_file(shared / "misc_videos" / "mmaction2__part_0.mp4", name)


def test_a_damaged_clip_is_refused_before_the_network_is_built(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no clip")
    with pytest.raises(DataError, match="not a whole clip"):
        classify_file(tmp_path / "clip.mp4", "kinetics400/i3d-rgb")
