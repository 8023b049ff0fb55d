import csv
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from medi3d.datasets.clips.clips import (
    Clip,
    evaluation_clip,
    load_clip,
    load_frames,
    looped,
    mirrored,
    read_clip_list,
    to_range,
    training_clip,
)
from medi3d.datasets.clips.flow import read_flow
from medi3d.datasets.clips.frames import read_frames
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.datasets.clips.splits import split_clips
from medi3d.errors import ConfigError, DataError

SMALL = ClipSettings(frames=8, side=16, crop=12)


@pytest.fixture
def ucf(shared):
    return ClipSettings(root=str(shared / "UCF101_subset8" / "clips.csv"))


@pytest.fixture
def listed(tmp_path):
    """Write a list of clips (and empty files for them) and give the settings that read it."""

    def write(rows, create=True):
        path = tmp_path / "clips.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys() if rows else ["path", "class"])
            writer.writeheader()
            writer.writerows(rows)
        for row in rows if create else []:
            (tmp_path / row["path"]).touch()
        return ClipSettings(root=str(path))

    return write


def counting_clip(frames=20, height=16, width=22):
    """Frame t is t everywhere in red, green says the column, blue the row."""
    image = torch.empty(3, frames, height, width, dtype=torch.uint8)
    image[0] = torch.arange(frames).view(-1, 1, 1)
    image[1] = torch.arange(width)
    image[2] = torch.arange(height).view(-1, 1)
    return {"image": image, "label": 2, "name": "counting"}


def as_bytes(image):
    return ((image + 1) * 127.5).round().long()


def test_ucf_list_is_read_as_it_says(ucf):
    listed = read_clip_list(ucf)
    assert (len(listed.clips), len(listed.classes)) == (64, 8)
    assert listed.classes[0] == "ApplyEyeMakeup"
    assert all(listed.classes[clip.label] in clip.name for clip in listed.clips)


def test_a_folder_per_class_reads_the_same_clips_as_the_list(ucf, shared):
    by_folder = read_clip_list(replace(ucf, root=str(shared / "UCF101_subset8" / "videos")))
    by_list = read_clip_list(ucf)
    key = lambda clip: clip.path  # noqa: E731
    assert sorted(by_folder.clips, key=key) == sorted(by_list.clips, key=key)
    assert by_folder.classes == by_list.classes


@pytest.mark.parametrize("groups", [1, 2])
def test_no_group_is_split_and_every_class_is_in_both_parts(ucf, groups):
    clips = read_clip_list(ucf).clips
    training, held = split_clips(clips, replace(ucf, validation_groups=groups))
    assert sorted(map(str, clips)) == sorted(map(str, training + held))
    assert not {(c.label, c.group) for c in training} & {(c.label, c.group) for c in held}
    assert {c.label for c in training} == {c.label for c in held} == set(range(8))
    assert len({(c.label, c.group) for c in held}) == 8 * groups


def test_the_split_follows_from_the_seed_alone(ucf):
    clips = read_clip_list(ucf).clips
    assert split_clips(clips, ucf) == split_clips(clips[::-1], ucf)
    assert split_clips(clips, ucf) != split_clips(clips, replace(ucf, split_seed=1))


def test_splits_of_the_list_hold(listed):
    rows = [
        {"path": "a.mp4", "class": "x", "split": "train"},
        {"path": "b.mp4", "class": "x", "split": "validation"},
        {"path": "c.mp4", "class": "x", "split": "test"},
    ]
    settings = listed(rows)
    training, held = split_clips(read_clip_list(settings).clips, settings)
    assert ([c.name for c in training], [c.name for c in held]) == (["a"], ["b"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no clip in it"),
        ([{"path": "a.mp4", "class": ""}], "line 2: no class"),
        ([{"file": "a.mp4"}], "line 2: no path and no class"),
        ([{"path": "a.mp4", "class": "x", "label": "1"}], "do not pair up"),
        ([{"path": n, "class": n, "label": "0"} for n in "ab"], "do not pair up"),
        ([{"path": n, "class": "x", "label": n} for n in "01"], "one class has two labels"),
    ],
    ids=["empty", "no class", "no columns", "from 1", "two classes a label", "two labels a class"],
)
def test_a_wrong_list_is_refused(listed, rows, message):
    with pytest.raises(DataError, match=message):
        read_clip_list(listed(rows, create=False))


def test_a_listed_file_that_is_not_there_is_named(listed):
    with pytest.raises(DataError, match=r"lists .*gone.mp4, but there is no such file"):
        read_clip_list(listed([{"path": "gone.mp4", "class": "x"}], create=False))


@pytest.mark.parametrize("name", ["none.csv", "none", "a.txt"])
def test_a_root_that_is_no_list_is_refused(tmp_path, name):
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="no such list of clips"):
        read_clip_list(ClipSettings(root=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train", None], "names no split but others do"),
        (["train", "val"], "group g of class 0 is in training and in validation"),
        (["val", "val"], "no clip is left for training"),
        ([None, None], r"class 0 has 1 group\(s\), too few"),
    ],
    ids=["some", "group in both", "no training", "one group"],
)
def test_a_split_that_cannot_be_is_refused(tmp_path, splits, message):
    clips = [Clip(tmp_path / f"{i}.mp4", 0, "g", split) for i, split in enumerate(splits)]
    with pytest.raises(DataError, match=message):
        split_clips(clips, ClipSettings())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"frames": 0}, "data.frames"),
        ({"crop": 300}, "data.crop"),
        ({"validation_groups": -1}, "data.validation_groups"),
        ({"streams": "depth"}, "data.streams is 'depth': use one of rgb, flow, both"),
        ({"rate": -1}, "data.rate"),
    ],
)
def test_settings_that_cannot_be_name_their_key(changes, key):
    with pytest.raises(ConfigError, match=key):
        ClipSettings(**changes)


@pytest.mark.parametrize("seed", range(5))
def test_training_sees_consecutive_frames_and_one_crop(seed):
    torch.manual_seed(seed)
    image = as_bytes(training_clip(counting_clip(), SMALL)["image"])
    assert image.shape == (3, 8, 12, 12)
    frames = image[0, :, 0, 0].tolist()
    assert all(after - before == 1 for before, after in pairwise(frames))
    assert (image[0] == image[0, :, :1, :1]).all()
    assert (image[1:] == image[1:, :1]).all()  # the same place, flipped or not, in every frame


def test_training_reaches_both_ends_of_time_and_space_and_flips_half():
    samples = [as_bytes(training_clip(counting_clip(), SMALL)["image"]) for _ in range(300)]
    assert {int(s[0, 0, 0, 0]) for s in samples} == set(range(13))
    assert {int(s[1].min()) for s in samples} == set(range(11))
    assert {int(s[2].min()) for s in samples} == set(range(5))
    flipped = sum(int(s[1, 0, 0, 0] > s[1, 0, 0, 1]) for s in samples)
    assert 110 < flipped < 190


def test_the_flip_can_be_switched_off():
    settings = replace(SMALL, flip=False)
    samples = [as_bytes(training_clip(counting_clip(), settings)["image"]) for _ in range(20)]
    assert all(s[1, 0, 0, 0] < s[1, 0, 0, 1] for s in samples)


def test_the_same_seed_gives_the_same_sample_and_the_cache_is_not_touched():
    whole = counting_clip()
    before = whole["image"].clone()
    first, second = ((torch.manual_seed(3), training_clip(whole, SMALL))[1]["image"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(whole["image"], before)


@pytest.mark.parametrize("frames", [1, 3, 8, 9])
def test_short_clips_are_looped(frames):
    image = counting_clip(frames)["image"]
    assert looped(image, 8)[0, :, 0, 0].tolist() == [t % frames for t in range(max(frames, 8))]
    assert training_clip(counting_clip(frames), SMALL)["image"].shape[1] == 8


def test_evaluation_takes_all_frames_and_the_centre():
    image = as_bytes(evaluation_clip(counting_clip(), SMALL)["image"])
    assert image[0, :, 0, 0].tolist() == list(range(20))
    assert image[1, 0, 0].tolist() == list(range(5, 17))
    assert image[2, 0, :, 0].tolist() == list(range(2, 14))


def test_bytes_become_minus_one_to_one():
    assert to_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_a_clip_is_loaded_as_the_network_takes_it(ucf):
    clip = read_clip_list(ucf).clips[5]
    sample = load_clip(clip, ucf)
    assert sample["image"].shape[0] == 3
    assert sample["image"].shape[1] >= 64
    assert sample["image"].shape[2:] == (224, 224)
    assert sample["image"].dtype == torch.float32
    assert sample["image"].abs().max() <= 1
    assert (sample["label"], sample["name"]) == (clip.label, clip.path.stem)


@pytest.mark.parametrize(("streams", "channels"), [("rgb", 3), ("flow", 2), ("both", 5)])
def test_streams_are_pictures_first_then_flow(encode, tmp_path, streams, channels):
    path = encode([np.full((32, 48, 3), 20 * t, np.uint8) for t in range(4)])
    settings = replace(SMALL, streams=streams, flow_cache=str(tmp_path / "flow"))
    image = load_frames(Clip(path, 0, "g"), settings)["image"]
    parts = [read_frames(path, 16), read_flow(path, settings.flow_cache, side=16, keep=12, rate=0)]
    expected = {"rgb": parts[:1], "flow": parts[1:], "both": parts}[streams]
    assert torch.equal(image, torch.cat(expected))
    assert image.shape == (channels, 4, 16, 24) == (settings.channels, *image.shape[1:])


@pytest.mark.parametrize("horizontal", [0, 3], ids=["flow", "both"])
def test_mirrored_flow_points_the_other_way(horizontal):
    image = torch.randint(0, 256, (horizontal + 2, 3, 4, 5), dtype=torch.uint8)
    turned = to_range(mirrored(image, horizontal))
    expected = to_range(image).flip(-1)
    expected[horizontal] *= -1
    torch.testing.assert_close(turned, expected)
    assert torch.equal(mirrored(mirrored(image, horizontal), horizontal), image)


def test_training_mirrors_the_flow_with_the_pictures():
    whole = counting_clip()
    whole["image"] = torch.cat([whole["image"], torch.full((2, 20, 16, 22), 200, dtype=torch.uint8)])
    whole["flow"] = 3
    for _ in range(20):
        image = as_bytes(training_clip(whole, SMALL)["image"])
        flipped = bool(image[1, 0, 0, 0] > image[1, 0, 0, 1])
        assert image[3:, 0, 0, 0].tolist() == [55 if flipped else 200, 200]


@pytest.fixture
def one_of_three_damaged(encode, tmp_path):
    """Settings for a folder with a whole clip in each of two classes, and one of no use."""
    for path in ("x/a.mp4", "x/b.mp4", "y/c.mp4"):
        encode([np.full((32, 48, 3), t, np.uint8) for t in range(3)], path)
    (tmp_path / "x" / "b.mp4").write_bytes((tmp_path / "x" / "b.mp4").read_bytes()[:300])
    return ClipSettings(root=str(tmp_path), validation_groups=0)


def test_a_damaged_clip_is_an_error_unless_skipping_is_asked_for(one_of_three_damaged, caplog):
    clips = read_clip_list(one_of_three_damaged).clips
    training, _ = split_clips(clips, one_of_three_damaged)
    with pytest.raises(DataError, match=r"b\.mp4: "):
        [load_frames(clip, one_of_three_damaged) for clip in training]
    training, _ = split_clips(clips, replace(one_of_three_damaged, skip_damaged=True))
    assert [clip.name for clip in training] == ["a", "c"]
    assert [r.message.split(" ")[0] for r in caplog.records] == ["skipped:"]
    assert "b.mp4" in caplog.text


def test_listed_clips_that_are_gone_are_skipped_only_if_asked_for(listed, caplog):
    settings = listed([{"path": "a.mp4", "class": "x"}, {"path": "b.mp4", "class": "x"}])
    settings = replace(settings, skip_damaged=True)
    gone = Path(settings.root).parent / "b.mp4"
    gone.unlink()
    assert [clip.name for clip in read_clip_list(settings).clips] == ["a"]
    assert f"skipped: {gone} is listed but missing" in caplog.text


def test_nothing_left_after_skipping_is_an_error(listed):
    settings = replace(listed([{"path": "a.mp4", "class": "x"}]), skip_damaged=True)
    with pytest.raises(DataError, match="none of its 1 clips can be decoded"):
        split_clips(read_clip_list(settings).clips, settings)
