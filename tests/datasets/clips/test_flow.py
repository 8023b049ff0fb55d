import os

import cv2
import numpy as np
import pytest
import torch

from medi3d.datasets.clips import flow as module
from medi3d.datasets.clips.clips import to_range
from medi3d.datasets.clips.flow import LIMIT, cached_flow, compute_flow, fill_cache, read_flow, to_bytes
from medi3d.errors import DataError

SMALL = {"side": 24, "keep": None, "rate": 0}


def texture(height=48, width=64, margin=16):
    """Smooth random grey, larger than the picture by `margin` on every side."""
    noise = np.random.default_rng(0).random((height + 2 * margin, width + 2 * margin), np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    return np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))


def moving(right, down, frames=3, margin=16):
    """Pictures (H, W, 3) of a texture that moves by so many pixels a frame."""
    whole = texture(margin=margin)
    tops, lefts = ([margin - step * t for t in range(frames)] for step in (down, right))
    pictures = [whole[top : top + 48, left : left + 64] for top, left in zip(tops, lefts, strict=True)]
    return [np.repeat(picture[..., None], 3, axis=2) for picture in pictures]


def as_frames(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, -3), (-1, 2)])
def test_a_moving_texture_has_the_flow_it_moves_with(right, down):
    flow = compute_flow(as_frames(moving(right, down)))
    assert flow.shape == (2, 3, 48, 64)
    inner = flow[:, :, 8:-8, 8:-8].flatten(1).median(dim=1).values
    torch.testing.assert_close(inner, torch.tensor([right, down]).float(), atol=0.1, rtol=0)
    assert torch.equal(flow[:, -1], flow[:, -2])


def test_one_frame_does_not_move():
    assert not compute_flow(as_frames(moving(1, 0, frames=1))).any()


def test_bytes_are_flow_truncated_to_20_pixels_and_scaled_as_the_paper_has_it():
    flow = torch.linspace(-30, 30, 1001)
    scaled = to_range(to_bytes(flow))
    half_step = 1 / 255
    torch.testing.assert_close(scaled, flow.clamp(-LIMIT, LIMIT) / LIMIT, atol=half_step * 1.001, rtol=0)
    assert (scaled.min(), scaled.max()) == (-1, 1)


@pytest.fixture
def clip(encode):
    return encode(moving(2, 1))


def test_kept_flow_is_the_computed_one_to_the_byte(clip, tmp_path):
    computed = read_flow(clip, tmp_path / "cache", **SMALL)
    kept = read_flow(clip, tmp_path / "cache", **SMALL)
    assert torch.equal(computed, kept)
    exact = compute_flow(module.read_frames(clip, **SMALL))
    assert (to_range(kept) * LIMIT - exact.clamp(-LIMIT, LIMIT)).abs().max() <= LIMIT / 255 * 1.001
    assert kept.shape == (2, 3, 24, 32)


def count_computations(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "compute_flow", lambda frames: (calls.append(1), compute_flow(frames))[1])
    return calls


def test_flow_is_computed_once_for_content_and_settings(clip, tmp_path, monkeypatch):
    calls = count_computations(monkeypatch)
    read_flow(clip, tmp_path / "cache", **SMALL)
    renamed = clip.rename(tmp_path / "renamed.mp4")
    read_flow(renamed, tmp_path / "cache", **SMALL)
    assert len(calls) == 1
    for change in ({"side": 16}, {"keep": 48}, {"rate": 12.5}):
        read_flow(renamed, tmp_path / "cache", **(SMALL | change))
    assert len(calls) == 4
    renamed.write_bytes(renamed.read_bytes() + b"x")
    read_flow(renamed, tmp_path / "cache", **SMALL)
    assert len(calls) == 5


def test_flow_that_was_damaged_on_disk_is_computed_anew(clip, tmp_path, monkeypatch):
    whole = read_flow(clip, tmp_path / "cache", **SMALL)
    kept = cached_flow(clip, tmp_path / "cache", **SMALL)
    kept.write_bytes(kept.read_bytes()[:100])
    calls = count_computations(monkeypatch)
    assert torch.equal(read_flow(clip, tmp_path / "cache", **SMALL), whole)
    assert len(calls) == 1


def test_a_run_killed_while_writing_leaves_nothing_half_done(clip, tmp_path, monkeypatch):
    def dies(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module.np, "savez_compressed", dies)
        with pytest.raises(KeyboardInterrupt):
            read_flow(clip, tmp_path / "cache", **SMALL)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert read_flow(clip, tmp_path / "cache", **SMALL).shape[0] == 2


def test_many_clips_are_filled_in_processes_and_a_second_run_does_what_is_missing(encode, tmp_path):
    clips = [encode(moving(1, t, frames=2), f"{t}.mp4") for t in range(3)]
    clips[1].write_bytes(clips[1].read_bytes()[:200])
    lines = []
    read_flow(clips[0], tmp_path / "cache", **SMALL)
    filled = os.stat(cached_flow(clips[0], tmp_path / "cache", **SMALL)).st_mtime_ns
    damaged = fill_cache(clips, tmp_path / "cache", processes=2, say=lines.append, **SMALL)
    assert damaged == [clips[1]]
    assert any("1.mp4: not a whole clip" in line for line in lines)
    assert len(lines) == 2
    assert os.stat(cached_flow(clips[0], tmp_path / "cache", **SMALL)).st_mtime_ns == filled
    assert cached_flow(clips[2], tmp_path / "cache", **SMALL).is_file()


def test_the_cache_lies_beside_the_others_unless_said(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDI3D_CACHE", str(tmp_path / "mine"))
    assert cached_flow(clip, **SMALL).is_relative_to(tmp_path / "mine" / "flow")


def test_a_missing_clip_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.mp4: no such clip"):
        read_flow(tmp_path / "none.mp4", tmp_path)


def test_without_opencv_the_message_says_what_to_install(clip, tmp_path, monkeypatch):
    monkeypatch.delattr(cv2, "optflow")
    with pytest.raises(DataError, match=r"contributed modules: pip install 'medi3d\[video\]'"):
        read_flow(clip, tmp_path / "cache", **SMALL)


def test_a_cache_that_cannot_be_written_is_named(clip, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="cannot keep flow there"):
        read_flow(clip, tmp_path / "cache", **SMALL)
