"""Every n-th frame, and folds of scenes."""

from pathlib import Path

import pytest
import torch

from medi3d.datasets.clips.clips import Clip, evaluation_clip, training_clip
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.datasets.clips.splits import split_clips
from medi3d.errors import ConfigError, DataError


def numbered(frames: int) -> dict:
    """A clip whose every pixel is its frame's number."""
    return {"image": torch.arange(frames, dtype=torch.uint8).view(1, -1, 1, 1).expand(3, -1, 4, 4)}


def numbers(sample: dict) -> list[int]:
    return ((sample["image"][0, :, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize(("frames", "stride"), [(4, 3), (3, 1), (2, 9)])
def test_training_sees_every_nth_frame_from_any_start(frames, stride):
    settings = ClipSettings(frames=frames, stride=stride, side=4, crop=4)
    starts = set()
    for _ in range(60):
        seen = numbers(training_clip(numbered(12), settings))
        assert seen == [seen[0] + i * stride for i in range(frames)]
        starts.add(seen[0])
    assert len(starts) == 12 - (frames - 1) * stride


@pytest.mark.parametrize("length", [3, 10, 11])
def test_the_whole_clip_is_seen_at_the_same_stride_and_looped_where_it_is_short(length):
    settings = ClipSettings(frames=4, stride=2, side=4, crop=4)
    expected = [i % length for i in range(0, max(length, 7), 2)]
    assert numbers(evaluation_clip(numbered(length), settings)) == expected


@pytest.fixture
def clips():
    """Three classes of 4, 5 and 2 scenes with two clips each."""
    return [
        Clip(Path(f"{label}_{scene}_{take}.mp4"), label, str(scene))
        for label, scenes in enumerate((4, 5, 2))
        for scene in range(scenes)
        for take in range(2)
    ]


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_judge_each_clip_once_and_cut_no_scene(clips, folds):
    judged = []
    for fold in range(folds):
        training, held = split_clips(clips, ClipSettings(folds=folds, fold=fold))
        assert not {c.subject for c in training} & {c.subject for c in held}
        assert {c.label for c in training} == {0, 1, 2}
        judged += held
    assert sorted(judged, key=str) == sorted(clips, key=str)


def test_folds_that_cannot_be_are_refused(clips):
    with pytest.raises(ConfigError, match=r"data\.folds is 1, data\.fold 0"):
        ClipSettings(folds=1)
    with pytest.raises(DataError, match="11 groups cannot make 20 folds"):
        split_clips(clips, ClipSettings(folds=20, fold=19))
    with pytest.raises(DataError, match="class 0 has one group only"):
        split_clips(clips[:2], ClipSettings(folds=2))
