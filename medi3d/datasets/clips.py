"""Video clips for classification: which there are, how they are split, and what the network sees of one.

A sample is made in two steps. `load_frames` decodes a clip, whole and at reduced size, as bytes that can be
kept in memory: pictures, optical flow, or both. From these `training_clip` cuts consecutive frames and a
random crop, `evaluation_clip` takes all frames and the centre, as I3D was trained and tested (Carreira &
Zisserman 2017, arXiv:1705.07750).
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medi3d.datasets.clip_lists import Row, read_rows
from medi3d.datasets.flow import read_flow
from medi3d.datasets.frames import read_frames
from medi3d.errors import ConfigError, DataError

log = logging.getLogger("medi3d")

STREAMS = {"rgb": 3, "flow": 2, "both": 5}
"""What a network sees, and its channels: red, green, blue; flow to the right and down; or all of these."""

TRAINING, VALIDATION = ("training", "train"), ("validation", "val", "valid", "validate")
"""Words for a split."""

Sample = dict[str, Any]
"""Keys "image" `(C, T, H, W)`, "label" (an int), "name"; "flow": the channel of flow to the right, or -1."""


@dataclass(frozen=True)
class ClipSettings:
    """A set of clips and what is done to each of them (config section)."""

    root: str = ""
    """CSV list (path, class; if wanted label, group, split), a folder with a folder per class, or a published
    list: UCF101's trainlist01.txt, HMDB51's FOLDER/*_test_split1.txt, Kinetics' train.csv"""
    videos: str = ""
    """folder of the clips of a list; empty: the list's own"""
    streams: str = "rgb"
    """rgb | flow | both: 3, 2 or 5 channels, pictures first"""
    rate: float = 0
    """frames per second to sample (I3D: 25); 0: the frames as they are stored"""
    skip_damaged: bool = False
    """leave out clips that are missing or cannot be decoded, each named in the log; else they are errors"""
    flow_cache: str = ""
    """folder in which computed flow is kept; empty: medi3d's cache"""
    frames: int = 64
    """frames that one training step sees of a clip; shorter clips are looped"""
    stride: int = 1
    """every so manieth frame is seen, such as 2 for SlowFast's 32 × 2; flow stays that between neighbours"""
    side: int = 256
    """pixels of the shorter side to which frames are resized"""
    crop: int = 224
    """pixels of the square that is cut out"""
    flip: bool = True
    """mirror every second training clip left to right; switch off where left and right are told apart"""
    validation_groups: int = 1
    """groups (clips of one scene) of each class to hold back, where the list names no split"""
    split_seed: int = 0
    """seed of the draw of these groups"""
    folds: int = 0
    """parts of the clips for cross-validation, groups undivided; 0 holds back `validation_groups` instead"""
    fold: int = 0
    """which of them validates, 0 to folds - 1; the others train"""

    def __post_init__(self) -> None:
        for key in ("frames", "stride", "side", "crop"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key} is {getattr(self, key)}: it must be 1 or more")
        if self.streams not in STREAMS:
            raise ConfigError(f"data.streams is {self.streams!r}: use one of {', '.join(STREAMS)}")
        if not 0 <= self.rate <= 1000:
            raise ConfigError(f"data.rate is {self.rate}: frames per second, or 0 for those that are stored")
        if self.crop > self.side:
            raise ConfigError(f"data.crop is {self.crop}, larger than data.side {self.side}")
        if self.validation_groups < 0:
            raise ConfigError(f"data.validation_groups is {self.validation_groups}: it must be 0 or more")
        if self.folds < 0 or self.folds == 1 or not 0 <= self.fold < max(self.folds, 1):
            raise ConfigError(
                f"data.folds is {self.folds}, data.fold {self.fold}: two folds or more (0: none), from 0 on"
            )

    @property
    def channels(self) -> int:
        """Channels of a sample."""
        return STREAMS[self.streams]


@dataclass(frozen=True)
class Clip:
    """One clip: its file, its class, and the group (scene, person, video) that it was cut from."""

    path: Path
    label: int
    group: str
    split: str | None = None
    """"training", "validation", another name (left out), or None: not said"""
    title: str = ""
    """its name where the list gives one, or where the file's name is that of several clips"""

    @property
    def name(self) -> str:
        """Its title, or the file's name without its suffix."""
        return self.title or self.path.stem

    @property
    def subject(self) -> tuple[int, str]:
        """Clips of one never part: the class and the group."""
        return (self.label, self.group)


@dataclass(frozen=True)
class ClipList:
    """Clips in the order of the list, and the class names in the order of their labels."""

    clips: tuple[Clip, ...]
    classes: tuple[str, ...]


def read_clip_list(settings: ClipSettings) -> ClipList:
    """Read which clips there are; none is opened yet, but each must be there.

    Paths are relative to the list. Without a column `label`, and in folders, classes are numbered in
    alphabetical order. Without a column `group` the group is read from names like UCF101's
    `v_Bowling_g05_c01`; other clips are a group each.

    Raises:
        DataError: the list is missing, empty or contradicts itself, or names a file that is not there.
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
            log.warning("skipped: %s is listed but not there", path)
        else:
            raise DataError(f"{root}: lists {path}, but there is no such file")
    if not clips:
        raise DataError(f"{root}: none of its {len(rows)} clips is there; set data.videos to their folder")
    return ClipList(tuple(clips), tuple(classes))


def sound_clips(clips: Sequence[Clip], settings: ClipSettings) -> list[Clip]:
    """The clips that can be decoded to the end; the others are named in the log. Decodes them all.

    Raises:
        DataError: none can.
    """
    sound = []
    for clip in clips:
        try:
            read_frames(clip.path, side=8, rate=settings.rate)
            sound.append(clip)
        except DataError as error:
            log.warning("skipped: %s", error)
    if not sound:
        raise DataError(f"{settings.root}: none of its {len(clips)} clips can be decoded")
    return sound


def split_clips(clips: Sequence[Clip], settings: ClipSettings) -> tuple[list[Clip], list[Clip]]:
    """Part clips into training and validation by (class, group): clips of one scene are near-duplicates.

    With `folds` one of them validates; of clips that name a split, those for training and validation are then
    put together. Otherwise the splits of the list hold, and where it names none `validation_groups` groups of
    each class are drawn. Draws are the same for the same seed whatever the order of the list; a class keeps
    at least one group for training.

    Raises:
        DataError: some clips name a split and some do not, a group is in both parts, or a class has too
            few groups.
    """
    if settings.skip_damaged:
        clips = sound_clips(clips, settings)
    ordered = sorted(clips, key=lambda clip: str(clip.path))
    if settings.folds:
        ordered = [clip for clip in ordered if clip.split in (None, *TRAINING, *VALIDATION)]
        drawn = _fold_of_groups(ordered, settings)
        return [c for c in ordered if c.subject not in drawn], [c for c in ordered if c.subject in drawn]
    named = [clip for clip in ordered if clip.split is not None]
    if named and len(named) < len(ordered):
        bare = next(clip for clip in ordered if clip.split is None)
        raise DataError(
            f"clip {bare.name} names no split but others do; give a split to all clips or to none"
        )
    if named:
        training = [clip for clip in ordered if clip.split in TRAINING]
        held = [clip for clip in ordered if clip.split in VALIDATION]
    else:
        drawn = _draw_groups(ordered, settings)
        training = [clip for clip in ordered if clip.subject not in drawn]
        held = [clip for clip in ordered if clip.subject in drawn]
    both = {c.subject for c in training} & {c.subject for c in held}
    if both:
        label, group = min(both)
        raise DataError(
            f"group {group} of class {label} is in training and in validation; a group belongs to one"
        )
    if not training:
        raise DataError(f"no clip is left for training of {len(ordered)}")
    return training, held


def load_frames(clip: Clip, settings: ClipSettings) -> Sample:
    """The whole clip at reduced size, as it can be kept in memory: "image" is uint8, 0 to 255.

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
    """Every `stride`th frame from a random start, one random crop and one coin for the flip, for all of them.

    Takes what `load_frames` gives; "image" becomes `(C, frames, crop, crop)` float32 in [-1, 1]. Mirrored,
    what moved to the right moves to the left: that channel of the flow changes its sign.
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
    """All (`stride`th) frames, `settings.frames` at least, and the centre crop, as float32 in [-1, 1]."""
    image = looped(sample["image"], _span(settings))[:, :: settings.stride]
    top, left = ((size - settings.crop) // 2 for size in image.shape[-2:])
    return {**sample, "image": to_range(image[..., top : top + settings.crop, left : left + settings.crop])}


def load_clip(clip: Clip, settings: ClipSettings) -> Sample:
    """Decode a clip and take what a network is tested on: "image" `(C, T, crop, crop)` float32 in [-1, 1].

    Raises:
        DataError: the file is missing or damaged, see `read_frames`.
    """
    return evaluation_clip(load_frames(clip, settings), settings)


def mirrored(image: Tensor, horizontal: int = -1) -> Tensor:
    """Bytes `(C, T, H, W)` turned left to right, with the flow of channel `horizontal` (-1: none) negated."""
    image = image.flip(-1)
    if horizontal >= 0:
        image[horizontal] = 255 - image[horizontal]
    return image


def looped(image: Tensor, frames: int) -> Tensor:
    """A clip `(C, T, H, W)` played again from its start until it has at least so many frames."""
    length = image.shape[1]
    return image if length >= frames else image[:, torch.arange(frames) % length]


def to_range(image: Tensor) -> Tensor:
    """Bytes 0 to 255 to float32 in [-1, 1], as I3D was trained: flow of 20 pixels a frame is 1."""
    return image.float().div_(127.5).sub_(1)


def _span(settings: ClipSettings) -> int:
    """Stored frames from the first to the last that a training step sees."""
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


def _fold_of_groups(clips: list[Clip], settings: ClipSettings) -> set[tuple[int, str]]:
    """The (class, group) of one fold: those of each class shuffled and dealt in turn to all folds."""
    drawn, dealt = set(), 0
    generator = np.random.default_rng(settings.split_seed)
    for label in sorted({clip.label for clip in clips}):
        groups = sorted({clip.group for clip in clips if clip.label == label})
        if len(groups) < 2:
            raise DataError(f"class {label} has one group only, so no fold of it can train; leave it out")
        for index in generator.permutation(len(groups)):
            if dealt % settings.folds == settings.fold:
                drawn.add((label, groups[index]))
            dealt += 1
    if not drawn:
        raise DataError(f"{dealt} groups cannot make {settings.folds} folds; set data.folds lower")
    return drawn


def _draw_groups(clips: list[Clip], settings: ClipSettings) -> set[tuple[int, str]]:
    drawn = set()
    generator = np.random.default_rng(settings.split_seed)
    for label in sorted({clip.label for clip in clips}):
        groups = sorted({clip.group for clip in clips if clip.label == label})
        if len(groups) <= settings.validation_groups:
            raise DataError(
                f"class {label} has {len(groups)} group(s), too few to hold back "
                f"{settings.validation_groups}; set data.validation_groups lower, or name splits in the list"
            )
        chosen = generator.permutation(len(groups))[: settings.validation_groups]
        drawn |= {(label, groups[i]) for i in chosen}
    return drawn
