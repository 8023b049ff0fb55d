import csv

import pytest

from medi3d.datasets.clips.clips import read_clip_list
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.datasets.clips.splits import split_clips
from medi3d.errors import DataError


@pytest.fixture
def files(tmp_path):
    """Write files below a folder, each with its text; clips are empty."""

    def write(contents):
        for name, text in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def read(settings):
    """(class, name) of the clips to train on and to validate on, and all classes."""
    listed = read_clip_list(settings)
    parts = split_clips(listed.clips, settings)
    return *([(listed.classes[c.label], c.name) for c in part] for part in parts), listed.classes


UCF = {
    "classInd.txt": "1 Bowling\n2 Archery\n",
    "trainlist01.txt": "Bowling/v_Bowling_g08_c01.avi 1\nArchery/v_Archery_g09_c01.avi 2\n\n",
    "testlist01.txt": "Bowling/v_Bowling_g01_c02.avi\n",
    "clips/Bowling/v_Bowling_g08_c01.avi": "",
    "clips/Bowling/v_Bowling_g01_c02.avi": "",
    "clips/Archery/v_Archery_g09_c01.avi": "",
}


def test_ucf101_lists_are_read_with_the_published_labels(files):
    root = files(UCF)
    training, held, classes = read(ClipSettings(str(root / "trainlist01.txt"), str(root / "clips")))
    assert training == [("Archery", "v_Archery_g09_c01"), ("Bowling", "v_Bowling_g08_c01")]
    assert (held, classes) == ([("Bowling", "v_Bowling_g01_c02")], ("Bowling", "Archery"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainlist01.txt": "Bowling/v_Bowling_g08_c01.avi 2\n"}, "does not fit the classes"),
        ({"testlist01.txt": "Boxing/a.avi\n"}, "'Boxing/a.avi' does not fit the classes"),
        ({"classInd.txt": "Bowling\n"}, "lines must be a number and a class"),
        ({"trainlist01.txt": "Bowling/gone.avi 1\n"}, "lists .*gone.avi, but there is no such file"),
    ],
    ids=["label", "class", "classInd", "gone"],
)
def test_ucf101_lists_that_contradict_themselves_are_refused(files, changes, message):
    root = files(UCF | changes)
    with pytest.raises(DataError, match=message):
        read_clip_list(ClipSettings(str(root / "trainlist01.txt"), str(root / "clips")))


def test_a_list_without_its_companion_names_it(files):
    root = files({"trainlist01.txt": "Bowling/v.avi 1\n"})
    with pytest.raises(DataError, match=r"classInd.txt: cannot be read"):
        read_clip_list(ClipSettings(str(root / "trainlist01.txt")))


HMDB = {
    "splits/wave_test_split1.txt": "a (1).avi 1 \nb.avi 2 \nc.avi 0 \n",
    "splits/brush_hair_test_split1.txt": "d.avi 1\n",
    "splits/brush_hair_test_split2.txt": "d.avi 2\n",
    **{f"clips/{name}.avi": "" for name in ("wave/a (1)", "wave/b", "wave/c", "brush_hair/d")},
}


@pytest.mark.parametrize(
    ("split", "training", "held"),
    [(1, [("brush_hair", "d"), ("wave", "a (1)")], [("wave", "b")]), (2, [], [("brush_hair", "d")])],
)
def test_hmdb51_lists_say_training_test_or_neither(files, split, training, held):
    settings = ClipSettings(
        str(files(HMDB) / "splits" / f"*_test_split{split}.txt"), str(files(HMDB) / "clips")
    )
    if split == 2:
        with pytest.raises(DataError, match="no clip is left for training"):
            read(settings)
        return
    assert read(settings) == (training, held, ("brush_hair", "wave"))


def test_an_hmdb51_line_without_its_number_is_refused(files):
    root = files({"wave_test_split1.txt": "a.avi 3\n"})
    with pytest.raises(DataError, match=r"'a\.avi 3' is not a clip followed by 0, 1 or 2"):
        read_clip_list(ClipSettings(str(root / "*_test_split1.txt")))


def kinetics(rows):
    head = "label,youtube_id,time_start,time_end,split\n"
    return head + "".join(f"{','.join(map(str, row))}\n" for row in rows)


KINETICS = {
    "train.csv": kinetics(
        [("playing cricket", "-aB_1", 10, 20, "train"), ("abseiling", "x", 3, 13, "train")]
    ),
    "validate.csv": kinetics([("abseiling", "y", 0, 10, "validate")]),
    "videos/train/playing_cricket/-aB_1_000010_000020.mp4": "",
    "videos/x.mkv": "",
    "videos/abseiling/y_000000_000010.mp4": "",
}


def test_kinetics_lists_find_their_clips_in_the_usual_places(files):
    root = files(KINETICS)
    training, held, classes = read(ClipSettings(str(root / "train.csv"), str(root / "videos")))
    assert sorted(training) == [("abseiling", "x"), ("playing cricket", "-aB_1_000010_000020")]
    assert (held, classes) == ([("abseiling", "y_000000_000010")], ("abseiling", "playing cricket"))


def test_kinetics_clips_that_are_gone_from_the_net_are_skipped_if_asked(files, caplog):
    (root := files(KINETICS), (root / "videos" / "x.mkv").unlink())
    settings = ClipSettings(str(root / "train.csv"), str(root / "videos"), skip_damaged=True)
    assert len(read_clip_list(settings).clips) == 2
    assert "x_000003_000013.mp4 is listed but missing" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", "", 1, 2, "train"), "line 2: no youtube_id"),
        (("a", "x", "soon", 2, "train"), "must be seconds"),
    ],
)
def test_a_wrong_kinetics_line_is_named(files, row, message):
    with pytest.raises(DataError, match=message):
        read_clip_list(ClipSettings(str(files({"train.csv": kinetics([row])}) / "train.csv")))


def test_clips_may_be_folders_of_pictures(files):
    root = files({"x/one/1.jpg": "", "x/one/2.jpg": "", "y/two.gif": "", "y/notes/a.txt": ""})
    listed = read_clip_list(ClipSettings(str(root)))
    assert [(listed.classes[c.label], c.name) for c in listed.clips] == [("x", "one"), ("y", "two")]


def test_a_csv_may_name_folders_and_clips_elsewhere(files):
    root = files({"far/a/1.png": ""})
    with (root / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "class"), ("a", "x")])
    (clip,) = read_clip_list(ClipSettings(str(root / "list.csv"), str(root / "far"))).clips
    assert clip.path == root / "far" / "a"
