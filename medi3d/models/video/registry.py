"""Video networks by name: the table of their builders, and shared helpers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medi3d.errors import ShapeError, SourceError
from medi3d.models.encoders import create_encoder
from medi3d.models.video.published import PUBLISHED

RGB, FLOW = slice(0, 3), slice(3, 5)
"""Channels of a clip that holds both: red, green, blue, then horizontal and vertical optical flow."""


@dataclass(frozen=True)
class VideoOptions:
    """Options for the builder of a video network."""

    num_classes: int
    in_channels: int
    dropout: float = 0.5
    weights: str | None = None
    contract: bool = True
    read_weights: bool = True
    proof: bool = False

    def encoder(self, source: str | nn.Module, plan: Any, **more: Any) -> nn.Module:
        """An encoder of the network (`create_encoder`); `more` overrides the options."""
        own = {
            "weights": self.weights,
            "in_channels": self.in_channels,
            "contract": self.contract,
            "read_weights": self.read_weights,
            "proof": self.proof,
        }
        return create_encoder(source, plan=plan, **{**own, **more})

    def stream_weights(self) -> tuple[str | None, str | None]:
        """Weights of the RGB and of the flow stream, from "RGB+FLOW"; "none" leaves a stream random.

        Raises:
            SourceError: weights are named, but not for both.
        """
        if self.weights is None:
            return None, None
        names = [None if name == "none" else name for name in self.weights.split("+")]
        if len(names) != 2:
            raise SourceError(
                f"weights {self.weights!r}: a network of two streams takes RGB+FLOW, such as "
                "kinetics400/i3d-rgb+none"
            )
        return names[0], names[1]


VIDEO: dict[str, Callable[[VideoOptions], nn.Module]] = {}
"""Name -> builder; `PUBLISHED` has the facts of each."""


def register_video(name: str) -> Callable:
    """Decorator: a function `VideoOptions -> nn.Module` that builds the network `name` of `PUBLISHED`."""

    def register(build: Callable[[VideoOptions], nn.Module]) -> Callable[[VideoOptions], nn.Module]:
        VIDEO[name] = build
        return build

    return register


def create_video(name: str, *, num_classes: int, in_channels: int | None = None, **options: Any) -> nn.Module:
    """The video network of that name: clips `(B, C, T, H, W)` -> logits `(B, num_classes)`.

    In training some return more, for the task's loss: `(B, num_classes, steps)` where every step has a loss,
    a list where streams are trained separately.

    Args:
        name: a key of `VIDEO`.
        num_classes: number of classes.
        in_channels: channels of the clips; None: as published (5 for RGB and flow together). For a two-stream
            network 3 builds the RGB stream alone, 2 the flow stream.
        options: `dropout`, `weights`, `contract`, `read_weights` and `proof`, see `create_encoder`.

    Raises:
        SourceError: an option that the network does not have; its kernel plan is fixed.
    """
    published = PUBLISHED[name]
    unknown = sorted(set(options) - set(VideoOptions.__dataclass_fields__))
    if unknown:
        raise SourceError(f"{name} has no option {unknown[0]}: its layers and its kernel plan are its own")
    if options.get("weights") is not None and not published.pretrained:
        raise SourceError(f"{name} is trained from scratch: no weights fit it, not {options['weights']!r}")
    channels = published.channels if in_channels is None else in_channels
    if published.channels == FLOW.stop and channels not in (2, 3, FLOW.stop):
        raise SourceError(
            f"{name} takes {published.channels} channels, RGB and flow, not {channels}; 3 or 2 build one of "
            "its streams alone"
        )
    return VIDEO[name](VideoOptions(num_classes, channels, **options))


FRAMES_AT_ONCE = 512
"""A longer clip is split into windows of this many frames, to bound memory: about 4 GB at 224 pixels."""


def of_any_length(clip: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits in float32 of a clip `(B, C, T, H, W)`, in one window up to `FRAMES_AT_ONCE` frames."""
    return over_windows(classify, clip, min(FRAMES_AT_ONCE, clip.shape[2])).float()


def over_windows(classify: Callable[[Tensor], Tensor], clip: Tensor, frames: int) -> Tensor:
    """Mean logits over the fewest windows of `frames` frames that cover a clip, evenly spaced.

    Raises:
        ShapeError: the clip is shorter than one window.
    """
    length = clip.shape[2]
    if length < frames:
        raise ShapeError(
            f"this network sees {frames} frames at once, the clip has {length}: set data.frames to {frames}"
        )
    count = -(-length // frames)
    starts = [round(i * (length - frames) / max(1, count - 1)) for i in range(count)]
    return torch.stack([classify(clip[:, :, start : start + frames]) for start in starts]).mean(dim=0)
