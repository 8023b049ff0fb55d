"""Video clips for classification: the list of clips, and the samples made from each.

A sample is made in two steps. `load_frames` decodes a whole clip at reduced size, as bytes that fit into
memory: pictures, optical flow, or both. From these `training_clip` cuts consecutive frames and a
random crop, `evaluation_clip` takes all frames and the centre, as I3D was trained and tested (Carreira &
Zisserman 2017, arXiv:1705.07750).
"""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medi3d.datasets.clips.flow import read_flow
from medi3d.datasets.clips.frames import read_frames
from medi3d.datasets.clips.lists import Row, read_rows
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.errors import DataError

log = logging.getLogger("medi3d")
Sample = dict[str, Any]
"""Keys "image" `(C, T, H, W)`, "label" (an int), "name"; "flow": the channel of flow to the right, or -1."""


@dataclass(frozen=True)
class Clip:
    """One clip: its file, its class, and the group (scene, person, video) that it was cut from."""

    path: Path
    label: int
    group: str
    split: str | None = None
    """"training", "validation", another name (left out), or None: not given"""
    title: str = ""
    """its name if the list gives one, or if several clips share the file's name"""

    @property
    def name(self) -> str:
        """Its title, or the file's name without its suffix."""
        return self.title or self.path.stem

    @property
    def subject(self) -> tuple[int, str]:
        """Class and group; clips that share both stay in the same split."""
        return (self.label, self.group)


@dataclass(frozen=True)
class ClipList:
    """Clips in the order of the list, and the class names in the order of their labels."""

    clips: tuple[Clip, ...]
    classes: tuple[str, ...]


def read_clip_list(settings: ClipSettings) -> ClipList:
    """List the clips; none is opened, but each file must exist.

    Paths are relative to the list. Without a column `label`, and in folders, classes are numbered in
    alphabetical order. Without a column `group` the group is read from names like UCF101's
    `v_Bowling_g05_c01`; every other clip is a group of its own.

    Raises:
        DataError: the list is missing, empty or contradicts itself, or names a missing file.
    """
    root = Path(settings.root)
    rows = read_rows(root, Path(settings.videos) if settings.videos else None)
    if not rows:
        raise DataError(f"{root}: no clip in it; at least one is needed")
    classes = _classes(rows, root)
    stems = Counter(Path(row["path"]).stem for row in rows)
    clips = []
    for row in rows:
        path = Path(row["path"])
        if path.exists():
            group = row.get("group") or _group_of(path.stem)
            title = row.get("name") or (f"{path.parent.name}_{path.stem}" if stems[path.stem] > 1 else "")
            label = classes.index(row["class"])
            clips.append(Clip(path, label, group, row.get("split") or None, title))
        elif settings.skip_damaged:
            log.warning("skipped: %s is listed but missing", path)
        else:
            raise DataError(f"{root}: lists {path}, but there is no such file")
    if not clips:
        raise DataError(f"{root}: none of its {len(rows)} clips is there; set data.videos to their folder")
    return ClipList(tuple(clips), tuple(classes))


def load_frames(clip: Clip, settings: ClipSettings) -> Sample:
    """Read the whole clip at reduced size, to be kept in memory: "image" is uint8, 0 to 255.

    Flow is taken from its cache, or computed (slowly) and kept there, see `flow.py`.

    Raises:
        DataError: the file is missing or damaged, see `read_frames`.
    """
    seen: dict[str, Any] = {"side": settings.side, "keep": settings.crop, "rate": settings.rate}
    parts = [read_frames(clip.path, **seen)] if settings.streams != "flow" else []
    if settings.streams != "rgb":
        parts.append(read_flow(clip.path, settings.flow_cache or None, **seen))
    horizontal = settings.channels - 2 if settings.streams != "rgb" else -1
    return {"image": torch.cat(parts), "label": clip.label, "name": clip.name, "flow": horizontal}


def training_clip(sample: Sample, settings: ClipSettings) -> Sample:
    """Take every `stride`-th frame from a random start, with one random crop and flip for all of them.

    Takes the result of `load_frames`; "image" becomes `(C, frames, crop, crop)` float32 in [-1, 1]. The
    flip negates the horizontal flow.
    """
    image, span = sample["image"], _span(settings)
    start = _random_below(max(1, image.shape[1] - span + 1))
    image = looped(image, span)[:, start : start + span : settings.stride]
    top, left = (_random_below(size - settings.crop + 1) for size in image.shape[-2:])
    image = image[..., top : top + settings.crop, left : left + settings.crop]
    if settings.flip and _random_below(2):
        image = mirrored(image, sample.get("flow", -1))
    return {**sample, "image": to_range(image)}


def evaluation_clip(sample: Sample, settings: ClipSettings) -> Sample:
    """Take every `stride`-th frame (at least `settings.frames`) and the centre crop as float32 in [-1, 1]."""
    image = looped(sample["image"], _span(settings))[:, :: settings.stride]
    top, left = ((size - settings.crop) // 2 for size in image.shape[-2:])
    return {**sample, "image": to_range(image[..., top : top + settings.crop, left : left + settings.crop])}


def load_clip(clip: Clip, settings: ClipSettings) -> Sample:
    """Decode a clip into a test sample: "image" `(C, T, crop, crop)` float32 in [-1, 1].

    Raises:
        DataError: the file is missing or damaged, see `read_frames`.
    """
    return evaluation_clip(load_frames(clip, settings), settings)


def mirrored(image: Tensor, horizontal: int = -1) -> Tensor:
    """Mirror bytes `(C, T, H, W)` left to right and negate the flow of channel `horizontal` (-1: none)."""
    image = image.flip(-1)
    if horizontal >= 0:
        image[horizontal] = 255 - image[horizontal]
    return image


def looped(image: Tensor, frames: int) -> Tensor:
    """Loop a clip `(C, T, H, W)` until it has at least `frames` frames."""
    length = image.shape[1]
    return image if length >= frames else image[:, torch.arange(frames) % length]


def to_range(image: Tensor) -> Tensor:
    """Bytes 0 to 255 to float32 in [-1, 1], as I3D was trained: flow of 20 pixels a frame is 1."""
    return image.float().div_(127.5).sub_(1)


def _span(settings: ClipSettings) -> int:
    """Number of stored frames from the first to the last that a training step sees."""
    return (settings.frames - 1) * settings.stride + 1


def _random_below(count: int) -> int:
    return int(torch.randint(count, ()))


def _classes(rows: list[Row], root: Path) -> list[str]:
    """Class names in the order of their labels, which must be 0, 1, 2, ..., one for each name."""
    if not rows[0].get("label"):
        return sorted({row["class"] for row in rows})
    pairs = sorted(
        {(row.get("label") or "", row["class"]) for row in rows}, key=lambda pair: (len(pair[0]), pair[0])
    )
    if [label for label, _ in pairs] != [str(i) for i in range(len(pairs))]:
        raise DataError(f"{root}: labels and classes do not pair up as 0, 1, 2, ...: {pairs[:6]}")
    classes = [name for _, name in pairs]
    if len(set(classes)) < len(classes):
        raise DataError(f"{root}: one class has two labels: {pairs[:6]}")
    return classes


def _group_of(name: str) -> str:
    numbered = re.search(r"_g(\d+)_c\d+$", name)
    return str(int(numbered[1])) if numbered else name
