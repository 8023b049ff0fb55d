import csv
import struct

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from medi3d.datasets.clips import frames as module
from medi3d.datasets.clips.frames import read_frames
from medi3d.errors import DataError

GIF = "i3d_published/v_CricketShot_g04_c01_rgb.gif"


@pytest.fixture
def write_clip(encode):
    """Encode frames of one colour, frame t of red 10 t, green 100, blue 200, and give the file."""

    def write(name="clip.mp4", frames=10, size=(48, 32), **how):
        pictures = [np.full((size[1], size[0], 3), (10 * t, 100, 200), np.uint8) for t in range(frames)]
        return encode(pictures, name, **how)

    return write


def shown(image):
    """The numbers of the frames, told by their red."""
    return (image[0].float().mean(dim=(1, 2)) / 10).round().int().tolist()


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_gif_is_decoded_as_pillow_does(shared):
    with Image.open(shared / GIF) as image:
        expected = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    assert torch.equal(read_frames(shared / GIF), torch.from_numpy(expected).permute(3, 0, 1, 2))


@pytest.mark.parametrize(
    ("name", "frames"),
    [("mmaction2__part_0.mp4", 32), ("mmaction2__test.avi", 164), ("C3D__v_BaseballPitch_g01_c01.avi", 107)],
)
def test_mp4_and_avi_are_decoded_whole(shared, name, frames):
    image = read_frames(shared / "misc_videos" / name, side=32)
    assert image.shape[:2] == (3, frames)
    assert min(image.shape[2:]) == 32


def test_every_ucf_clip_has_the_frames_that_its_list_says(shared):
    root = shared / "UCF101_subset8"
    rows = list(csv.DictReader((root / "clips.csv").read_text().splitlines()))[::8]
    assert [read_frames(root / row["path"], side=16).shape[1] for row in rows] == [
        int(r["frames"]) for r in rows
    ]


def test_frames_come_in_order_and_in_red_green_blue(write_clip):
    image = read_frames(write_clip())
    assert image.dtype == torch.uint8
    red, green, blue = image.float().mean(dim=(2, 3))
    torch.testing.assert_close(red, 10.0 * torch.arange(10), atol=8, rtol=0)
    torch.testing.assert_close(green, torch.full((10,), 100.0), atol=8, rtol=0)
    torch.testing.assert_close(blue, torch.full((10,), 200.0), atol=8, rtol=0)


@pytest.mark.parametrize(
    ("size", "side", "keep", "expected"),
    [
        ((48, 32), 16, None, (16, 24)),
        ((32, 48), 16, None, (24, 16)),
        ((48, 32), 64, None, (64, 96)),
        ((48, 32), 64, 32, (32, 48)),
        ((48, 32), None, None, (32, 48)),
    ],
    ids=["landscape", "portrait", "enlarged", "prepared", "as it is"],
)
def test_the_shorter_side_is_resized(write_clip, size, side, keep, expected):
    assert read_frames(write_clip(size=size), side, keep).shape[2:] == expected


def test_one_frame_is_a_clip(write_clip):
    assert read_frames(write_clip(frames=1)).shape == (3, 1, 32, 48)


MATRICES = {
    "as it is": (1, 0, 0, 1),
    "right": (0, 1, -1, 0),
    "half": (-1, 0, 0, -1),
    "left": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed and turned": (0, -1, -1, 0),
}


def with_matrix(clip, matrix):
    """The clip with another display matrix in its track header (ISO/IEC 14496-12, 8.3.2)."""
    a, b, c, d = (round(v * (1 << 16)) for v in matrix)
    content = bytearray(clip.read_bytes())
    place = content.find(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip.write_bytes(content)
    return clip


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_frames_are_turned_and_mirrored_as_their_display_matrix_says(encode, matrix):
    picture = np.full((32, 48, 3), 40, np.uint8)
    picture[:16, :24] = 230  # the upper left quarter
    image = read_frames(with_matrix(encode([picture] * 3, "clip.mp4"), matrix))
    a, b, c, d = matrix
    corner = (a * -1 + c * -1, b * -1 + d * -1)  # of (x, y) = (-1, -1) about the centre
    height, width = image.shape[2:]
    assert (height, width) == ((32, 48) if a else (48, 32))
    quarter = image[0, 0].float().view(2, height // 2, 2, width // 2).mean(dim=(1, 3))
    assert quarter.argmax() == 2 * (corner[1] > 0) + (corner[0] > 0)


@pytest.mark.parametrize("name", ["as it is", "right", "half", "left"])
def test_turns_are_those_that_ffmpeg_reports(encode, name):
    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    clip = with_matrix(encode([picture], "clip.mp4"), MATRICES[name])
    with av.open(str(clip)) as container:
        frame = next(container.decode(video=0))
        expected = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    np.testing.assert_array_equal(read_frames(clip)[:, 0].permute(1, 2, 0).numpy(), expected)


def test_a_skewed_clip_is_refused(write_clip):
    with pytest.raises(DataError, match="not a multiple of 90 degrees"):
        read_frames(with_matrix(write_clip(), (0.7, 0.7, -0.7, 0.7)))


CONTAINERS = {
    "webm": ("clip.webm", {"codec": "libvpx-vp9"}),
    "mkv": ("clip.mkv", {"codec": "libx264"}),
    "ts": ("clip.ts", {"codec": "libx264"}),
    "ts, mpeg2": ("clip.ts", {"codec": "mpeg2video"}),
    "flv": ("clip.flv", {"codec": "flv"}),
}


@pytest.mark.parametrize("share", [0.51, 2 / 3, 0.93], ids="{:.0%}".format)
@pytest.mark.parametrize(("name", "how"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_clips_that_do_not_say_their_length_are_whole_or_refused(encode, name, how, share):
    noise = np.random.default_rng(0).integers(0, 255, (20, 96, 128, 3), np.uint8)
    clip = encode(list(noise), name, **how)
    assert read_frames(clip).shape[1] == 20
    content = clip.read_bytes()
    clip.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=f"{name}: (cut short|not a whole clip)") as refusal:
        read_frames(clip)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("share", [1, 0.7], ids=["whole", "cut"])
def test_a_live_recording_without_lengths_is_whole_or_refused(encode, share):
    noise = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), np.uint8)
    clip = encode(list(noise), "clip.webm", codec="libvpx-vp9", options={"live": "1"})
    content = clip.read_bytes()
    clip.write_bytes(content[: int(share * len(content))])
    if share == 1:
        assert read_frames(clip).shape[1] == 20
        return
    with pytest.raises(DataError, match="cut short"):
        read_frames(clip)


def test_sound_alone_is_refused(sound):
    with pytest.raises(DataError, match="has no video stream, only audio"):
        read_frames(sound)


@pytest.mark.parametrize("content", [b"", b"not a clip at all" * 100], ids=["empty", "text"])
def test_files_that_are_no_clips_are_refused(tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"clip.mp4: (the clip is empty|not a whole clip)") as refusal:
        read_frames(path)
    assert "\n" not in str(refusal.value)


def test_a_missing_clip_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.mp4: no such clip"):
        read_frames(tmp_path / "none.mp4")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9], ids="{:.0%}".format)
@pytest.mark.parametrize(
    "name",
    ["misc_videos/mmaction2__demo.mp4", "misc_videos/mmaction2__test.avi", GIF],
    ids=["mp4", "avi", "gif"],
)
def test_cut_files_are_refused(shared, tmp_path, name, share):
    whole = (shared / name).read_bytes()
    path = tmp_path / name.split("/")[-1]
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=path.name) as refusal:
        read_frames(path, side=16)
    assert "\n" not in str(refusal.value)


def test_a_cut_file_with_its_header_in_front_is_refused(write_clip):
    path = write_clip(frames=20, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cut short|not a whole clip"):
        read_frames(path)


def test_a_clip_that_is_too_long_is_refused(write_clip, monkeypatch):
    monkeypatch.setattr(module, "MAX_FRAMES", 9)
    with pytest.raises(DataError, match="more than 9 frames; cut it to the action"):
        read_frames(write_clip(frames=10))


def test_without_pyav_the_message_says_what_to_install(monkeypatch, write_clip):
    path = write_clip()
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'medi3d\[video\]'"):
        read_frames(path)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0, range(10)), (25, range(10)), (12.5, range(0, 10, 2)), (50, [t // 2 for t in range(20)])],
    ids=["as stored", "the same", "half", "double"],
)
def test_frames_are_sampled_by_the_clock(write_clip, rate, expected):
    assert shown(read_frames(write_clip(), rate=rate)) == list(expected)


def test_a_clip_of_variable_rate_is_sampled_by_the_clock(write_clip):
    path = write_clip("clip.mkv", frames=4, times=[0, 100, 400, 440])
    assert shown(read_frames(path, rate=10))[:5] == [0, 1, 1, 1, 2]
    assert shown(read_frames(path)) == [0, 1, 2, 3]


@pytest.mark.parametrize("rate", [1, 25])
def test_one_frame_is_sampled_once(write_clip, rate):
    assert read_frames(write_clip(frames=1), rate=rate).shape[1] == 1


def test_a_clip_that_is_too_long_when_sampled_is_refused(write_clip):
    with pytest.raises(DataError, match="more than 2000 frames"):
        read_frames(write_clip(), rate=900 * 25)


def test_huge_pictures_are_reduced_as_they_are_read(write_clip):
    assert read_frames(write_clip(frames=2, size=(3840, 2160)), side=32).shape == (3, 2, 32, 57)


@pytest.mark.parametrize("name", ["none.mkv", "none.avi"])
def test_a_container_without_frames_is_refused(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.start_encoding()
    with pytest.raises(DataError, match=f"{name}: (holds no frame|not a whole clip|has no video)") as refusal:
        read_frames(tmp_path / name)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def folder(tmp_path):
    for t in range(11):  # 10 comes after 9, though not in the alphabet
        Image.new("RGB", (6, 4), (20 * t, 0, 0)).save(tmp_path / f"frame{t}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_a_folder_of_pictures_is_a_clip(folder):
    assert read_frames(folder)[0, :, 0, 0].tolist() == [20 * t for t in range(11)]
    assert read_frames(folder, side=8).shape == (3, 11, 8, 12)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("frame3.png", b"no picture", "frame3.png: not a whole clip"),
        ("frame3.png", b"", "frame3.png: the clip is"),
    ],
    ids=["damaged", "empty"],
)
def test_a_damaged_picture_of_a_folder_is_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_frames(folder)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no frame"):
        read_frames(tmp_path)


def test_pictures_of_two_sizes_are_refused(folder):
    Image.new("RGB", (8, 4)).save(folder / "frame3.png")
    with pytest.raises(DataError, match="change in size"):
        read_frames(folder)
