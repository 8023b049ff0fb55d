"""Decode a clip into frames, with PyAV: MP4, AVI, GIF, folders of pictures, whatever FFmpeg reads."""

import re
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medi3d.datasets.clips.endings import check_end, ends_early
from medi3d.errors import DataError, first_line

MAX_FRAMES = 2000
"""Most frames of a clip, which are held in memory at once: one action, 80 s at 25 frames per second."""

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Suffixes of pictures, of which a folder makes a clip."""

_ONE = 1 << 16
"""1 in a display matrix."""
_SKEW = 0.02
"""Largest rounding error of the other axis in a display matrix of a right angle."""

_LOST = 0.05
"""Share of the frames promised by the header that may be missing: edit lists drop a few, cut files many."""


def read_frames(
    path: str | Path, side: int | None = None, keep: int | None = None, rate: float = 0
) -> Tensor:
    """Read all frames of a clip as uint8 RGB, `(3, T, H, W)`.

    Args:
        path: of the clip; of several video streams the first is read. From a folder, its pictures are read
            in the order of the numbers in their names.
        side: pixels that the shorter side is resized to, bilinear (as Kinetics was); None: unchanged.
        keep: a clip whose shorter side has exactly this size is already prepared and is not resized.
        rate: frames per second to sample by the clip's time stamps, each the one shown at that moment (I3D:
            25); 0: the frames as stored, whatever their rate. Pictures of a folder have no time stamps.

    Raises:
        DataError: the file is missing, empty, damaged, cut short, too long, or has no picture.
    """
    av = _import_av()
    path = Path(path)
    folder = path.is_dir()
    frames = _read_folder(path, side, keep, av) if folder else _read_file(path, side, keep, rate, av)
    if not frames:
        raise DataError(f"{path}: holds no frame")
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{path}: the frames change in size")
    return torch.from_numpy(np.stack(frames, axis=1))


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of the numbers in their names: 9 before 10."""
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
    return sorted(pictures, key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)] or [0])


def _read_folder(folder: Path, side: int | None, keep: int | None, av: Any) -> list[np.ndarray]:
    pictures = pictures_in(folder)
    if len(pictures) > MAX_FRAMES:
        raise DataError(
            f"{folder}: has {len(pictures)} pictures, more than {MAX_FRAMES}; cut it to the action"
        )
    return [_read_file(picture, side, keep, 0, av)[0] for picture in pictures]


def _read_file(path: Path, side: int | None, keep: int | None, rate: float, av: Any) -> list[np.ndarray]:
    if not path.is_file():
        raise DataError(f"{path}: no such clip")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the clip is empty")
    if path.suffix.lower() == ".gif" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
        raise DataError(f"{path}: cut short, a GIF ends with its trailer")  # nothing else in it shows that
    frames: list[np.ndarray] = []
    decoded = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: has no video stream, only {_kinds(container)}")
            stream = container.streams.video[0]
            check_end(path, container.format.name)
            frame = None
            for decoded, frame, times in _sampled(container.decode(stream), stream, rate, path):  # noqa: B007
                if len(frames) + times > MAX_FRAMES:
                    raise DataError(f"{path}: has more than {MAX_FRAMES} frames; cut it to the action")
                if times:
                    frames += [_picture(frame, side, keep)] * times
            promised = stream.frames
            if frame is not None and not promised and ends_early(container, stream, frame):
                raise DataError(f"{path}: cut short, its end is damaged or missing after {decoded} frames")
    except (av.FFmpegError, ValueError) as error:
        reason = first_line(error)
        raise DataError(
            f"{path}: not a whole clip (decoding fails after {decoded} frames: {reason})"
        ) from error
    if not decoded:
        raise DataError(f"{path}: holds no frame")
    if decoded < promised * (1 - _LOST):
        raise DataError(f"{path}: cut short, {decoded} of {promised} frames are there")
    return frames


def _sampled(frames: Iterator[Any], stream: Any, rate: float, path: Path) -> Iterator[tuple[int, Any, int]]:
    """Each frame with its number (from 1) and how many times it is shown: once, or as sampled at `rate`."""
    if not rate:
        yield from ((number, frame, 1) for number, frame in enumerate(frames, start=1))
        return
    step, due, waiting = 1 / Fraction(rate), Fraction(0), None
    start, number, moment = None, 0, Fraction(0)
    pace = 1 / (stream.average_rate or stream.guessed_rate or Fraction(rate))
    for number, frame in enumerate(frames, start=1):
        if frame.pts is None:
            raise DataError(f"{path}: no time stamps, so data.rate {rate:g} cannot be met; set it to 0")
        moment = frame.pts * Fraction(frame.time_base)
        start = moment if start is None else start
        if waiting is not None:
            times = _ticks(due, moment - start, step)
            due += times * step
            yield number - 1, waiting, times
        waiting = frame
    if waiting is not None and start is not None:
        lasts = waiting.duration * Fraction(waiting.time_base) if waiting.duration else pace
        yield number, waiting, max(_ticks(due, moment - start + lasts, step), int(due == 0))


def _ticks(due: Fraction, end: Fraction, step: Fraction) -> int:
    """How many of the moments due, due + step, ... lie before `end`."""
    return max(0, -((due - end) // step))


def _picture(frame: Any, side: int | None, keep: int | None) -> np.ndarray:
    """One frame upright, `(3, H, W)`."""
    height, width = frame.height, frame.width
    if side is not None and min(height, width) not in (side, keep):
        scale = side / min(height, width)
        height, width = max(side, round(height * scale)), max(side, round(width * scale))
    rgb = frame.reformat(width, height, format="rgb24", interpolation="BILINEAR").to_ndarray()
    return np.ascontiguousarray(upright(rgb, display_matrix(frame)).transpose(2, 0, 1))


def display_matrix(frame: Any) -> tuple[float, float, float, float]:
    """The display matrix `(a, b, c, d)`: x to the right and y downwards go to a·x + c·y and b·x + d·y."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
            return (a / _ONE, b / _ONE, c / _ONE, d / _ONE)
    return (1, 0, 0, 1)


def upright(picture: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray:
    """Rotate and mirror a picture `(H, W, 3)` by its display matrix, whose scaling is ignored.

    Raises:
        ValueError: the angle is not a multiple of 90 degrees.
    """
    a, b, c, d = matrix
    turned, straight = abs(b) + abs(c), abs(a) + abs(d)
    if min(turned, straight) > _SKEW * max(turned, straight):
        raise ValueError("its pictures are rotated by an angle that is not a multiple of 90 degrees")
    if turned > straight:
        picture, a, d = picture.transpose(1, 0, 2), c, b
    if a < 0:
        picture = picture[:, ::-1]
    return picture[::-1] if d < 0 else picture


def _kinds(container: Any) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError("reading clips needs PyAV: pip install 'medi3d[video]'") from error
    return av
