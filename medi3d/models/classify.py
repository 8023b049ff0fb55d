"""Name what a clip shows, with a published video network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medi3d.errors import SourceError
from medi3d.inflation.network import build
from medi3d.inflation.plan import KernelPlan
from medi3d.models.inception import InceptionV1Classifier
from medi3d.weights.catalogue import get_row, read_classes
from medi3d.weights.load import load_weights


def build_published_classifier(weights: str) -> tuple[nn.Module, list[str]]:
    """The published I3D with its own head, ready to use, and its class names.

    Takes clips `(B, C, T, H, W)` in the range of the row's input contract; gives logits `(B, classes, T')`.

    Raises:
        WeightsError: no such row, it has no classes, or the file is not on this machine.
        SourceError: the row is not of I3D.
    """
    row = get_row(weights)
    classes = read_classes(row)
    if row.source != "inception_v1" or row.contract is None:
        raise SourceError(f"weights {row.name} are of {row.source}; classify needs those of inception_v1")
    net2d = InceptionV1Classifier(len(classes), in_channels=len(row.contract.channels))
    network, _ = build(net2d, KernelPlan.video())  # proven where it is tested, not for every clip anew
    load_weights(network, row)
    return network.eval(), classes


@torch.inference_mode()
def classify_clip(
    network: nn.Module, clip: Tensor, classes: Sequence[str], top: int = 5
) -> list[tuple[str, float]]:
    """The likeliest classes of one clip with their probabilities, likeliest first.

    Args:
        network: gives logits `(B, classes, T')`, averaged over time as published, or `(B, classes)`.
        clip: `(C, T, H, W)`.
        classes: names in the order of the logits.
        top: how many.
    """
    logits = network(clip.unsqueeze(0))[0]
    logits = logits.mean(dim=1) if logits.dim() == 2 else logits
    probabilities, indices = logits.softmax(dim=0).topk(min(top, len(classes)))
    return [(classes[i], float(p)) for i, p in zip(indices.tolist(), probabilities, strict=True)]
