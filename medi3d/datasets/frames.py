"""Decode a clip into frames, with PyAV: MP4, AVI, GIF and whatever else its FFmpeg reads."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medi3d.errors import DataError

MAX_FRAMES = 2000
"""A clip is one action, 80 s at 25 frames per second; as many frames are held in memory at once."""

_LOST = 0.05
"""Share of the frames promised by the header that may be missing: edit lists drop a few, cut files many."""


def read_frames(path: str | Path, side: int | None = None, keep: int | None = None) -> Tensor:
    """All frames of a clip as uint8 RGB, `(3, T, H, W)`.

    Args:
        path: of the clip; of several video streams the first is read.
        side: pixels that the shorter side is resized to, bilinear (as Kinetics was); None: as it is.
        keep: a clip whose shorter side has just so many pixels was prepared already and is not resized.

    Raises:
        DataError: the file is missing, empty, damaged, cut short, too long, or has no picture.
    """
    av = _import_av()
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such clip")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the clip is empty")
    if path.suffix.lower() == ".gif" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
        raise DataError(f"{path}: cut short, a GIF ends with its trailer")  # nothing else in it tells
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: has no video stream, only {_kinds(container)}")
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                if len(frames) == MAX_FRAMES:
                    raise DataError(f"{path}: has more than {MAX_FRAMES} frames; cut it to the action")
                frames.append(_picture(frame, side, keep))
            promised = stream.frames
    except (av.FFmpegError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: not a whole clip (decoding fails after {len(frames)} frames: {reason})"
        ) from error
    if not frames:
        raise DataError(f"{path}: holds no frame")
    if len(frames) < promised * (1 - _LOST):
        raise DataError(f"{path}: cut short, {len(frames)} of {promised} frames are there")
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{path}: the frames change in size")
    return torch.from_numpy(np.stack(frames, axis=1))


def _picture(frame: Any, side: int | None, keep: int | None) -> np.ndarray:
    """One frame upright, `(3, H, W)`."""
    height, width = frame.height, frame.width
    if side is not None and min(height, width) not in (side, keep):
        scale = side / min(height, width)
        height, width = max(side, round(height * scale)), max(side, round(width * scale))
    rgb = frame.reformat(width, height, format="rgb24", interpolation="BILINEAR").to_ndarray()
    upright = np.rot90(rgb, frame.rotation // 90)  # a phone says how it was held, in degrees to the left
    return np.ascontiguousarray(upright.transpose(2, 0, 1))


def _kinds(container: Any) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError("reading clips needs PyAV: pip install 'medi3d[video]'") from error
    return av
