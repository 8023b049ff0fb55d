"""`medi3d classify`: name the action in a video file."""

from pathlib import Path

from medi3d.datasets.clips.clips import Clip, load_clip
from medi3d.datasets.clips.settings import ClipSettings
from medi3d.models.video.published_classifier import (
    build_published_classifier,
    check_published,
    classify_clip,
    published_streams,
)


def classify_file(path: str | Path, weights: str, top: int = 5) -> list[tuple[str, float]]:
    """The most probable classes of a clip, from the centre crop of all its frames.

    Optical flow, where the weights need it, is computed (TV-L1, about a second per frame) and cached.

    Args:
        path: of the clip.
        weights: a row that has classes, or two, RGB+FLOW, whose logits are added.
        top: how many classes.

    Raises:
        DataError: the clip is missing or damaged.
        WeightsError, SourceError: see `build_published_classifier`.
    """
    settings = ClipSettings(streams=published_streams(weights))
    if settings.streams != "rgb":  # flow takes minutes: report first what else is missing
        check_published(weights)
    clip = load_clip(Clip(Path(path), 0, ""), settings)["image"]
    network, classes = build_published_classifier(weights)
    return classify_clip(network, clip, classes, top)
