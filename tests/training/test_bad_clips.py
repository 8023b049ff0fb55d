"""Odd and damaged clips through train, classify and features: a result, or one clear line."""

import wave

import numpy as np
import pytest

from medi3d.datasets.clips import frames as frames_module
from medi3d.models.artifact import save_artifact
from medi3d.models.encoders import create_encoder
from tests.tiny import CLIPS_CONFIG, write_clips

PICTURES = list(np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8))
SIZE = ["data.frames=4", "training.steps=1", "training.validate_every=1", "training.precision=fp32"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    encoder = create_encoder("timm:test_resnet", in_channels=3, levels=2, plan="planar")
    return save_artifact(encoder, tmp_path_factory.mktemp("artifact") / "net.safetensors")


@pytest.fixture
def medi3d(medi3d):
    """Run the command line in this process: (exit code, its lines on stderr)."""

    def run(*arguments):
        code, _, err = medi3d(*arguments)
        return code, [line for line in err.splitlines() if line.startswith("medi3d: ")]

    return run


def truncated(encode, tmp_path):
    path = encode(PICTURES * 10, "odd.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def without_frames(encode, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "odd.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    return tmp_path / "odd.mkv"


def sound(encode, tmp_path):
    with wave.open(str(tmp_path / "odd.avi"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    return tmp_path / "odd.avi"


def endless(encode, tmp_path):
    return encode(PICTURES * 4, "odd.mp4")


BAD = {
    "truncated": (truncated, "not a whole clip"),
    "without frames": (without_frames, "odd.mkv"),
    "sound alone": (sound, "no video stream, only audio"),
    "too long": (endless, "more than 20 frames"),
}
GOOD = {
    "one frame": lambda encode: encode(PICTURES[:1], "odd.mp4"),
    "variable rate": lambda encode: encode(PICTURES, "odd.mkv", times=[0, 40, 50, 300, 320, 900]),
    "large pictures": lambda encode: encode([np.zeros((1080, 1920, 3), np.uint8)] * 2, "odd.mp4"),
}


@pytest.fixture(params=BAD.values(), ids=BAD.keys())
def bad(request, encode, tmp_path, monkeypatch):
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 20)
    make, message = request.param
    return make(encode, tmp_path), message


def test_a_damaged_clip_ends_each_command_in_one_line(bad, medi3d, artifact, tmp_path):
    path, message = bad
    root = write_clips(tmp_path / "clips")
    path.rename(root / "above" / path.name)
    path = root / "above" / path.name
    config = tmp_path / "clips.yaml"
    config.write_text(CLIPS_CONFIG.format(root=root))
    features = ("features", path, "--network", artifact, "--at", "level1", "--out", tmp_path / "out")
    for arguments in (
        ("classify", path, "--weights", "kinetics400/i3d-rgb"),
        features,
        ("train", config, *SIZE, "--runs", tmp_path / "runs"),
    ):
        code, lines = medi3d(*arguments)
        assert (code, len(lines)) == (1, 1), arguments
        assert message in lines[0]
        assert "odd" in lines[0]


@pytest.fixture(params=GOOD.values(), ids=GOOD.keys())
def good(request, encode):
    return request.param(encode)


def test_an_odd_clip_gives_a_result(good, medi3d, artifact, tmp_path):
    root = write_clips(tmp_path / "clips")
    good.rename(root / "above" / good.name)
    config = tmp_path / "clips.yaml"
    config.write_text(CLIPS_CONFIG.format(root=root))
    assert medi3d("train", config, *SIZE, "--runs", tmp_path / "runs") == (0, [])
    features = ("--network", artifact, "--at", "level1", "--pooled", "--out", tmp_path / "out")
    assert medi3d("features", root / "above" / good.name, *features) == (0, [])
    with np.load(tmp_path / "out" / "odd.npz") as kept:
        assert np.isfinite(kept["features"]).all()
