"""Name the action in a video file: what `medi3d classify` does."""

from pathlib import Path

from medi3d.datasets.clips import ClipSettings, evaluation_clip
from medi3d.datasets.frames import read_frames
from medi3d.errors import DataError
from medi3d.models.classify import build_published_classifier, classify_clip
from medi3d.weights.catalogue import get_row


def classify_file(path: str | Path, weights: str, top: int = 5) -> list[tuple[str, float]]:
    """The likeliest classes of a clip with their probabilities; the whole clip is looked at, its centre crop.

    Raises:
        DataError: the clip is missing or damaged, or the weights want optical flow.
        WeightsError, SourceError: see `build_published_classifier`.
    """
    contract = get_row(weights).contract
    if contract is not None and contract.channels != "RGB":
        raise DataError(f"weights {weights} take optical flow, not pictures; use kinetics400/i3d-rgb")
    settings = ClipSettings()
    frames = read_frames(path, settings.side, keep=settings.crop)
    sample = evaluation_clip({"image": frames}, settings)
    network, classes = build_published_classifier(weights)
    return classify_clip(network, sample["image"], classes, top)
