"""Encoders, segmenters and classifiers for volumes and clips, put together from parts.

create_encoder     source + weights + plan  ->  x (B, C, D, H, W) -> list of feature maps
create_segmenter   encoder + U-Net decoder  ->  logits (B, classes, D, H, W), any size
create_classifier  encoder + linear head    ->  logits (B, classes), or a video network by name
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medi3d.errors import ConfigError, ShapeError, SourceError
from medi3d.keys import check_inert
from medi3d.models.classifier import Classifier
from medi3d.models.encoders import create_encoder
from medi3d.models.segmenter import HEADS, Segmenter, check_head
from medi3d.models.video import VIDEO, create_video
from medi3d.models.whole import create_whole, is_whole


@dataclass(frozen=True)
class NetworkSettings:
    """Which network, from which weights (config section `network`)."""

    source: str = "inception_v1"
    """timm:NAME, torchvision:NAME, medicalnet:NAME, inception_v1, unet (the lean baseline), ...; to classify
    clips also i3d, two_stream_i3d, slowfast_r50, ... (docs/video.md)"""
    weights: str | None = None
    """a row of `medi3d weights list`, timm, file:PATH; null: from scratch"""
    plan: str | None = None
    """kernel plan: isotropic, video, planar or a YAML file; null: isotropic, or a video network's own"""
    profile: str | None = None
    """how 2D kernels are spread over depth: mean, centre, factorised, repeat, acs; null: mean, or its own"""
    in_channels: int = 1
    """channels of the volumes or clips"""
    contract: bool = True
    """map data in [-1, 1] to the range, mean and std that the weights expect"""
    levels: int | None = None
    """encoder levels to use, fine to coarse; null: all"""
    decoder_channels: list[int] | None = None
    """channels of the decoder levels, fine to coarse; null: 16, 32, 64, 96, 128"""
    norm: str = "instance"
    """norm of the decoder: instance, batch, group"""
    head: str = "convolution"
    """head of a segmenter: convolution, on decoder maps at full resolution; subpixel, all voxels of a
    position of the encoder's finest map at once, in half the time"""
    deep_supervision: bool = False
    """also compute the loss on the coarser decoder levels"""
    dropout: float = 0.5
    """fraction of features dropped before a classifier's linear layer"""

    def __post_init__(self) -> None:
        for key in ("source", "weights", "plan", "profile"):
            check_inert(f"network.{key}", getattr(self, key))
        if self.in_channels < 1:
            raise ConfigError(f"network.in_channels is {self.in_channels}: it must be 1 or more")
        if self.norm not in ("instance", "batch", "group"):
            raise ConfigError(f"network.norm is {self.norm!r}: use instance, batch or group")
        check_head(self.head)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"network.dropout is {self.dropout}: it must be at least 0 and below 1")
        if self.levels is not None and self.levels < 1:
            raise ConfigError(f"network.levels is {self.levels}: it must be 1 or more, or null for all")

    def encoder_options(self) -> dict[str, Any]:
        """Options of `create_encoder` without the weights; null leaves its defaults."""
        options = {
            "plan": self.plan,
            "profile": self.profile,
            "in_channels": self.in_channels,
            "levels": self.levels,
            "contract": self.contract,
        }
        return {key: value for key, value in options.items() if value is not None}

    def decoder_options(self) -> dict[str, Any]:
        """Options of `create_segmenter` other than those of its encoder."""
        return {
            "channels": self.decoder_channels,
            "norm": self.norm,
            "deep_supervision": self.deep_supervision,
            "head": self.head,
        }


def create_network(
    settings: NetworkSettings,
    task: str,
    num_classes: int,
    *,
    read_weights: bool = True,
    proof: bool = True,
    contract: bool | Mapping[str, Any] | None = None,
    size: int | None = None,
) -> nn.Module:
    """The network of a config: a segmenter for task "segmentation", a classifier for "classification".

    With `read_weights=False` it is the network for a checkpoint that holds the weights: identical, including
    the weights' input contract, but their file is not read. `proof=False` also skips the proof of exactness,
    which would prove the random weights that the checkpoint replaces. `contract` is the checkpoint's input
    contract, in place of the weights'. `size` is the height and width of the input, for transformers that
    take a single size (`create_encoder`).

    Raises:
        ConfigError: unknown task.
        SourceError: a plan, a profile or levels for a video network, which has its own.
    """
    if task not in ("segmentation", "classification"):
        raise ConfigError(f"task is {task!r}: use segmentation or classification")
    options = {**settings.encoder_options(), "weights": settings.weights, "read_weights": read_weights}
    if task == "classification" and settings.source in VIDEO:
        return create_classifier(
            settings.source, num_classes=num_classes, dropout=settings.dropout, **options
        )
    rest_seed = int(torch.randint(2**62, ()))
    if contract is not None:
        options["contract"] = contract
    encoder = create_encoder(settings.source, **options, proof=proof, size=size)
    torch.manual_seed(rest_seed)  # decoder and head start the same for any encoder weights
    if task == "classification":
        return create_classifier(encoder, num_classes=num_classes, dropout=settings.dropout)
    return create_segmenter(encoder, num_classes=num_classes, **settings.decoder_options())


def create_segmenter(
    encoder_or_source: str | nn.Module,
    *,
    num_classes: int,
    channels: Sequence[int] | None = None,
    norm: str = "instance",
    deep_supervision: bool = False,
    head: str = "convolution",
    **encoder_options: Any,
) -> nn.Module:
    """A segmentation network for volumes: `(B, C, D, H, W)` -> `(B, num_classes, D, H, W)`, any size.

    A 2D network whose output is one map of its image's size is already a segmentation network: it is inflated
    whole, with a fresh head, and keeps its own decoder (docs/segmentation_networks.md).

    Args:
        encoder_or_source: an encoder, or a source for `create_encoder`; `unet` is the lean baseline; or a 2D
            segmentation network.
        num_classes: number of classes, background included; 1 for one channel followed by a sigmoid.
        channels: channels of the decoder levels, fine to coarse; None: 16, 32, 64, 96, 128.
        norm: norm of the decoder: instance, batch or group.
        deep_supervision: in training mode return logits of all decoder levels, finest first.
        head: convolution, on decoder maps at full resolution; or subpixel, all voxels of a position of the
            encoder's finest map at once, in half the time.
        encoder_options: `weights`, `plan`, `in_channels`, `profile`, `levels`, `size` of `create_encoder`.

    Raises:
        ShapeError: fewer than one class, or strides that a U-Net cannot join.
    """
    _check_classes(num_classes)
    source, size = encoder_or_source, encoder_options.get("size")
    if isinstance(source, nn.Module) and not _is_encoder(source) and is_whole(source, size):
        decoder = {"channels": channels, "deep_supervision": deep_supervision or None}
        own = {"norm": None if norm == "instance" else norm, "head": None if head == HEADS[0] else head}
        given = {name: value for name, value in {**decoder, **own}.items() if value is not None}
        return create_whole(source, num_classes, **given, **encoder_options)
    encoder = _encoder(encoder_or_source, encoder_options)
    return Segmenter(
        encoder, num_classes, channels=channels, norm=norm, deep_supervision=deep_supervision, head=head
    )


def create_classifier(
    encoder_or_source: str | nn.Module, *, num_classes: int, dropout: float = 0.5, **encoder_options: Any
) -> nn.Module:
    """A classification network for clips or volumes: `(B, C, T, H, W)` -> `(B, num_classes)`.

    Arguments as for `create_segmenter`, one class for a regression; a name of `medi3d.models.video`
    (docs/video.md) builds that network, with its own layers, kernel plan and head (`create_video`).
    """
    _check_classes(num_classes)
    if isinstance(encoder_or_source, str) and encoder_or_source in VIDEO:
        return create_video(encoder_or_source, num_classes=num_classes, dropout=dropout, **encoder_options)
    return Classifier(_encoder(encoder_or_source, encoder_options), num_classes, dropout=dropout)


def _encoder(encoder_or_source: str | nn.Module, options: dict[str, Any]) -> nn.Module:
    if _is_encoder(encoder_or_source):
        assert isinstance(encoder_or_source, nn.Module)
        if options:
            raise SourceError(
                f"options {sorted(options)} belong to a source; the encoder given is already built"
            )
        return encoder_or_source
    return create_encoder(encoder_or_source, **options)


def _is_encoder(source: object) -> bool:
    """Whether it declares maps; a 2D network may use `strides` in another sense (MONAI's U-Net)."""
    return hasattr(source, "strides") and isinstance(getattr(source, "out_channels", None), (list, tuple))


def _check_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ShapeError(
            f"num_classes is {num_classes}: give 2 or more (background counts as one), or 1 for "
            "one channel that a sigmoid follows, or a regression"
        )
