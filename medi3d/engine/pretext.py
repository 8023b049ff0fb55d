"""Pretraining as a task of the engine: restore damaged volumes, or segment synthetic images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from medi3d.axes import Triple
from medi3d.engine.inference import single_forward
from medi3d.engine.metrics import Row
from medi3d.engine.task import Logits, Task, image_and_label, segmentation
from medi3d.errors import ConfigError

KINDS = ("masked", "restoration", "synthetic")
RATES = ("share", "shuffle", "bend", "paint", "paint_out")


@dataclass(frozen=True)
class PretextSettings:
    """What the network learns from unlabelled volumes (config section `pretext`).

    Attributes:
        kind: "masked": fill hidden random cubes; "restoration": undo the changes of Models Genesis
            (Zhou et al. 2019); "synthetic": segment images drawn from label maps (SynthSeg-style).
        cube: masked: side of a cube in voxels.
        share: masked: fraction of the cubes that is hidden.
        shuffle: restoration: probability that voxels change places in small blocks.
        bend: restoration: probability of a random monotone intensity curve.
        paint: restoration: probability that noise covers blocks.
        paint_out: restoration: fraction of these in which noise covers all but blocks.
        labels: synthetic: name -> label values to segment; all other labels count as background, but
            each is drawn with its own intensity.
    """

    kind: str = "masked"
    cube: int = 8
    share: float = 0.6
    shuffle: float = 0.5
    bend: float = 0.9
    paint: float = 0.9
    paint_out: float = 0.8
    labels: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"pretext.kind is {self.kind!r}: one of {', '.join(KINDS)}")
        if self.cube < 1:
            raise ConfigError(f"pretext.cube is {self.cube}: a side in voxels, 1 or more")
        for key in RATES:
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"pretext.{key} is {getattr(self, key)}: 0 to 1")
        if self.kind == "synthetic" and not self.labels:
            raise ConfigError("pretext.labels is empty: name the label values to segment, {name: [values]}")
        values = [value for group in self.labels.values() for value in group]
        if len(set(values)) < len(values):
            raise ConfigError("pretext.labels names a value twice; each belongs to one name")


def pretext(settings: PretextSettings, channels: int, patch: Triple) -> Task:
    """The task of a pretraining on volumes with `channels` channels, in patches (D, H, W)."""
    if settings.kind == "synthetic":
        task = segmentation(list(settings.labels), patch)
        return replace(task, name="pretraining", inferer=single_forward)
    return Task(
        name="pretraining",
        classes=tuple(f"channel {number}" for number in range(channels)),
        prepare_batch=image_and_label,
        loss=restoration_loss,
        inferer=single_forward,
        postprocess=lambda restored: restored,
        metrics=restoration_scores,
        score="explained",
    )


def restoration_loss(restored: Logits, target: Tensor) -> Tensor:
    """Mean squared error over the voxels that count.

    Args:
        restored: `(B, C, D, H, W)`.
        target: `(B, C + 1, D, H, W)`: the volume as it was, and in the last channel 1 where it counts.
    """
    if not isinstance(restored, Tensor):
        raise TypeError("a network that restores gives one tensor (B, C, D, H, W), not a list")
    error, counts = (restored.float() - target[:, :-1]).square(), target[:, -1:]
    return (error * counts).sum() / (counts.sum() * error.shape[1]).clamp_min(1)


def restoration_scores(restored: Tensor, target: Tensor) -> list[Row]:
    """Fraction of the variance of the counted voxels that was restored (1: all; 0: no better than their
    mean), one row per item of the batch. Arguments as `restoration_loss`.
    """
    rows: list[Row] = []
    for one, whole in zip(restored.float(), target, strict=True):
        counts = whole[-1].bool()
        truth, guess = whole[:-1, counts], one[:, counts]
        spread = (truth - truth.mean(dim=1, keepdim=True)).square().sum().clamp_min(1e-6)
        rows.append({"explained": 1 - float((guess - truth).square().sum() / spread)})
    return rows


def group_numbers(labels: Mapping[str, Sequence[int]], values: Sequence[int]) -> list[int]:
    """The group of each label value of a map: 1, 2, ... in the order of `labels`; 0 for all others."""
    numbers = {value: number for number, group in enumerate(labels.values(), 1) for value in group}
    return [numbers.get(value, 0) for value in values]
