"""Split clips into training and validation, keeping scenes whole."""

from collections.abc import Sequence

import numpy as np

from medi3d.datasets.clips.clips import Clip, log
from medi3d.datasets.clips.frames import read_frames
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.errors import DataError

TRAINING, VALIDATION = ("training", "train"), ("validation", "val", "valid", "validate")
"""Words for a split."""


def sound_clips(clips: Sequence[Clip], settings: ClipSettings) -> list[Clip]:
    """Keep the clips that can be decoded to the end; the others are named in the log. Decodes them all.

    Raises:
        DataError: none can be decoded.
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
    """Split clips into training and validation by (class, group): clips of one scene are near-duplicates.

    With `folds`, one fold validates; the list's training and validation clips are pooled first. Otherwise the
    splits of the list are used; if it names none, `validation_groups` groups of each class are drawn. A draw
    depends on the seed but not on the order of the list; a class keeps at least one group for training.

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
