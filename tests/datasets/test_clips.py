import csv
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from medi3d.datasets.clips import (
    Clip,
    ClipSettings,
    evaluation_clip,
    load_clip,
    looped,
    read_clip_list,
    split_clips,
    to_range,
    training_clip,
)
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
    with pytest.raises(DataError, match=r"lists gone.mp4, but there is no such file"):
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
