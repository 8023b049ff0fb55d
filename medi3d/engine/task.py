"""What differs between segmenting volumes and classifying clips, as one value; the loop is the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor
from torch.nn.functional import cross_entropy

from medi3d.axes import Triple
from medi3d.engine.inference import Inferer, SlidingWindow, single_forward
from medi3d.engine.metrics import Row, dice_scores, mean_of_present, top_k
from medi3d.engine.precision import Precision

Logits = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Task:
    """What the engine must know of a problem.

    Attributes:
        name: "segmentation" or "classification".
        classes: names of the network's output channels.
        prepare_batch: (batch, precision) -> image `(B, C, D, H, W)` and target on the device.
        loss: (logits in float32, or a list of them, finest first; target) -> scalar.
        inferer: how a whole case is predicted.
        postprocess: logits -> prediction `(B, ...)`, or probabilities where the metrics need them.
        metrics: (prediction, target) -> one row of numbers per case.
        score: the number, mean over cases, that tells the best network; higher is better.
    """

    name: str
    classes: tuple[str, ...]
    prepare_batch: Callable[[dict[str, Any], Precision], tuple[Tensor, Tensor]]
    loss: Callable[[Logits, Tensor], Tensor]
    inferer: Inferer
    postprocess: Callable[[Tensor], Tensor]
    metrics: Callable[[Tensor, Tensor], list[Row]]
    score: str


def segmentation(
    labels: Sequence[str], window: Triple, *, overlap: float = 0.5, patch: Triple | None = None
) -> Task:
    """Segment volumes into background and `labels`.

    Target is `(B, 1, D, H, W)`. The loss is Dice (without background) plus cross entropy; for a list of
    logits, as a network with deep supervision gives in training, their sum, halved at each coarser level.

    Args:
        labels: names of the labels 1, 2, ...
        window: size in voxels, (D, H, W), up to which a volume is predicted in one piece.
        overlap: of sliding windows, 0 to 1.
        patch: size in voxels of what the network is trained on; None: the window's.
    """
    names = tuple(labels)
    dice_ce = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    deep = DeepSupervisionLoss(dice_ce)

    def loss(logits: Logits, target: Tensor) -> Tensor:
        if isinstance(logits, Tensor):
            return dice_ce(logits.float(), target)
        return deep([level.float() for level in logits], target)

    def metrics(pred: Tensor, target: Tensor) -> list[Row]:
        rows = [dice_scores(p, t[0], names) for p, t in zip(pred, target, strict=True)]
        return [{"dice": mean_of_present(row.values()), **row} for row in rows]

    return Task(
        name="segmentation",
        classes=("background", *names),
        prepare_batch=image_and_label,
        loss=loss,
        inferer=SlidingWindow(window, overlap, patch=patch),
        postprocess=lambda logits: logits.argmax(dim=1),
        metrics=metrics,
        score="dice",
    )


def classification(classes: Sequence[str], inferer: Inferer = single_forward) -> Task:
    """Tell which of `classes` a clip or volume shows. Target is `(B,)`; the loss is cross entropy.

    Logits in training are `(B, classes)`; or `(B, classes, steps)`, where every step names the class, and
    its loss counts alike (an LSTM); or a list, of streams that learn apart, whose losses are added.
    """

    def loss(logits: Logits, target: Tensor) -> Tensor:
        if not isinstance(logits, Tensor):
            return torch.stack([loss(stream, target) for stream in logits]).sum()
        every_step = target.long().view(-1, *[1] * (logits.dim() - 2)).expand(-1, *logits.shape[2:])
        return cross_entropy(logits.float(), every_step)

    return Task(
        name="classification",
        classes=tuple(classes),
        prepare_batch=image_and_label,
        loss=loss,
        inferer=inferer,
        postprocess=lambda logits: logits.softmax(dim=1),
        metrics=top_k,
        score="top1",
    )


def image_and_label(batch: dict[str, Any], precision: Precision) -> tuple[Tensor, Tensor]:
    """A batch's image `(B, C, D, H, W)` and label on the device, in float32."""
    # float labels: deep supervision shrinks them with interpolate, which knows no integers
    label = torch.as_tensor(batch["label"]).to(precision.device, torch.float32)
    return precision.place(batch["image"].float()), label
