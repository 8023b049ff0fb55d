"""Classify a clip with a published video network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medi3d.errors import SourceError
from medi3d.inflation.network import build
from medi3d.inflation.plan import KernelPlan
from medi3d.models.inception import InceptionV1Classifier
from medi3d.models.video.figure2 import TwoStream
from medi3d.models.video.registry import of_any_length
from medi3d.weights.catalogue import find_weights, get_row, read_classes
from medi3d.weights.load import load_weights

STREAMS = {"RGB": "rgb", "UV": "flow"}
"""Channels of an input contract -> what the clip must hold."""


def published_streams(weights: str) -> str:
    """The streams of a clip that a row's network uses: "rgb", "flow", or "both" for two rows, RGB+FLOW.

    Raises:
        WeightsError: no such row.
        SourceError: it uses neither, or two rows are not RGB+FLOW.
    """
    seen = []
    for name in weights.split("+"):
        contract = get_row(name).contract
        if contract is None or contract.channels not in STREAMS:
            raise SourceError(f"weights {name} are not for a network of clips")
        seen.append(STREAMS[contract.channels])
    if len(seen) > 1 and seen != ["rgb", "flow"]:
        raise SourceError(
            f"weights {weights!r} are of {', '.join(seen)}: two streams must be RGB+FLOW, in this order"
        )
    return seen[0] if len(seen) == 1 else "both"


def build_published_classifier(weights: str) -> tuple[nn.Module, list[str]]:
    """The published I3D with its own head, ready to use, and its class names.

    Takes clips `(B, C, T, H, W)` in the range of the row's input contract; returns logits `(B, classes, T')`.
    For two rows, RGB+FLOW, it is both networks with their logits added; clips then have five channels.

    Raises:
        WeightsError: no such row, it has no classes, or the file is not on this machine.
        SourceError: the row is not of I3D, or two rows are not a pair.
    """
    published_streams(weights)
    made = [_build_stream(name) for name in weights.split("+")]
    (network, classes), (_, others) = made[0], made[-1]
    if others != classes:
        raise SourceError(f"weights {weights!r}: {len(classes)} and {len(others)} classes, which differ")
    return (network if len(made) == 1 else TwoStream(network, made[1][0], add=True)).eval(), classes


def check_published(weights: str) -> None:
    """Refuse rows that name no classes or are not on this machine, before a clip is read for them.

    Raises:
        WeightsError, SourceError: see `build_published_classifier`.
    """
    published_streams(weights)
    for name in weights.split("+"):
        _check_row(name)
        find_weights(get_row(name))


def _check_row(name: str) -> list[str]:
    row = get_row(name)
    classes = read_classes(row)
    if row.source != "inception_v1":
        raise SourceError(f"weights {row.name} are of {row.source}; classify needs those of inception_v1")
    return classes


def _build_stream(name: str) -> tuple[nn.Module, list[str]]:
    row, classes = get_row(name), _check_row(name)
    assert row.contract is not None
    net2d = InceptionV1Classifier(len(classes), in_channels=len(row.contract.channels))
    network, _ = build(net2d, KernelPlan.video())  # proven in the tests, not again for every clip
    load_weights(network, row)
    return network.eval(), classes


@torch.inference_mode()
def classify_clip(
    network: nn.Module, clip: Tensor, classes: Sequence[str], top: int = 5
) -> list[tuple[str, float]]:
    """The likeliest classes of one clip with their probabilities, likeliest first.

    Args:
        network: returns logits `(B, classes, T')`, averaged over time as published, or `(B, classes)`.
        clip: `(C, T, H, W)`.
        classes: names in the order of the logits.
        top: number of classes to return.
    """
    logits = of_any_length(clip.unsqueeze(0), network)[0]
    logits = logits.mean(dim=1) if logits.dim() == 2 else logits
    probabilities, indices = logits.softmax(dim=0).topk(min(top, len(classes)))
    return [(classes[i], float(p)) for i, p in zip(indices.tolist(), probabilities, strict=True)]
