"""Encoders, segmenters and classifiers for volumes and clips, put together from parts.

create_encoder     source + weights + plan  ->  x (B, C, D, H, W) -> list of feature maps
create_segmenter   encoder + U-Net decoder  ->  logits (B, classes, D, H, W), any size
create_classifier  encoder + linear head    ->  logits (B, classes)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medi3d.errors import ConfigError, ShapeError, SourceError
from medi3d.models.encoders import create_encoder
from medi3d.models.segmenter import Segmenter


@dataclass(frozen=True)
class NetworkSettings:
    """Which network, from which weights (config section `network`)."""

    source: str = "inception_v1"
    """timm:NAME, torchvision:NAME, medicalnet:NAME, inception_v1, unet (the lean baseline), ..."""
    weights: str | None = None
    """a row of `medi3d weights list`, timm, file:PATH; null: from scratch"""
    plan: str = "isotropic"
    """kernel plan: isotropic, video, planar or a YAML file"""
    profile: str = "mean"
    """how 2D kernels are spread over depth: mean, centre, factorised, repeat, acs"""
    in_channels: int = 1
    """channels of the volumes or clips"""
    contract: bool = True
    """take data in [-1, 1] to the range, mean and std that the weights expect"""
    levels: int | None = None
    """encoder levels to use, fine to coarse; null: all"""
    decoder_channels: list[int] | None = None
    """channels of the decoder levels, fine to coarse; null: 16, 32, 64, 96, 128"""
    norm: str = "instance"
    """norm of the decoder: instance, batch, group"""
    deep_supervision: bool = False
    """compare the coarser decoder levels with the label too"""
    dropout: float = 0.5
    """share of features dropped before a classifier's linear layer"""

    def __post_init__(self) -> None:
        if self.in_channels < 1:
            raise ConfigError(f"network.in_channels is {self.in_channels}: it must be 1 or more")
        if self.norm not in ("instance", "batch", "group"):
            raise ConfigError(f"network.norm is {self.norm!r}: use instance, batch or group")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"network.dropout is {self.dropout}: it must be at least 0 and below 1")
        if self.levels is not None and self.levels < 1:
            raise ConfigError(f"network.levels is {self.levels}: it must be 1 or more, or null for all")


def build_network(
    settings: NetworkSettings, task: str, num_classes: int, *, read_weights: bool = True
) -> nn.Module:
    """The network of a config: a segmenter for task "segmentation", a classifier for "classification".

    With `read_weights=False` it is the network for a checkpoint that holds them: the same in every
    way, the input contract of its weights included, but their file is not read.

    Raises:
        ConfigError: another task.
    """
    if task not in ("segmentation", "classification"):
        raise ConfigError(f"task is {task!r}: use segmentation or classification")
    rest_seed = int(torch.randint(2**62, ()))
    encoder = create_encoder(
        settings.source,
        weights=settings.weights,
        plan=settings.plan,
        in_channels=settings.in_channels,
        profile=settings.profile,
        levels=settings.levels,
        contract=settings.contract,
        read_weights=read_weights,
    )
    torch.manual_seed(rest_seed)  # decoder and head start the same, whatever filled the encoder
    if task == "classification":
        return create_classifier(encoder, num_classes=num_classes, dropout=settings.dropout)
    return create_segmenter(
        encoder,
        num_classes=num_classes,
        channels=settings.decoder_channels,
        norm=settings.norm,
        deep_supervision=settings.deep_supervision,
    )


class Classifier(nn.Module):
    """Encoder, mean over depth, height and width of its last map, dropout, linear layer."""

    def __init__(self, encoder: nn.Module, num_classes: int, *, dropout: float = 0.5) -> None:
        super().__init__()
        declared: Any = encoder
        self.encoder = encoder
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(declared.out_channels[-1], num_classes))

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> logits `(B, num_classes)`."""
        return self.head(self.encoder(clip)[-1].mean(dim=(2, 3, 4)))


def create_segmenter(
    encoder_or_source: str | nn.Module,
    *,
    num_classes: int,
    channels: Sequence[int] | None = None,
    norm: str = "instance",
    deep_supervision: bool = False,
    **encoder_options: Any,
) -> nn.Module:
    """A segmentation network for volumes: `(B, C, D, H, W)` -> `(B, num_classes, D, H, W)`, any size.

    Args:
        encoder_or_source: an encoder, or a source for `create_encoder`; `unet` is the lean baseline.
        num_classes: classes of a voxel, background included.
        channels: of the decoder levels, fine to coarse; None: 16, 32, 64, 96, 128.
        norm: of the decoder: instance, batch or group.
        deep_supervision: in training mode return logits of all decoder levels, finest first.
        encoder_options: `weights`, `plan`, `in_channels`, `profile`, `levels` of `create_encoder`.

    Raises:
        ShapeError: fewer than two classes, or strides that a U-Net cannot join.
    """
    _check_classes(num_classes)
    encoder = _encoder(encoder_or_source, encoder_options)
    return Segmenter(encoder, num_classes, channels=channels, norm=norm, deep_supervision=deep_supervision)


def create_classifier(
    encoder_or_source: str | nn.Module, *, num_classes: int, dropout: float = 0.5, **encoder_options: Any
) -> nn.Module:
    """A classification network for clips or volumes: `(B, C, T, H, W)` -> `(B, num_classes)`.

    Arguments as for `create_segmenter`.
    """
    _check_classes(num_classes)
    return Classifier(_encoder(encoder_or_source, encoder_options), num_classes, dropout=dropout)


def _encoder(encoder_or_source: str | nn.Module, options: dict[str, Any]) -> nn.Module:
    if isinstance(encoder_or_source, nn.Module) and hasattr(encoder_or_source, "strides"):
        if options:
            raise SourceError(
                f"options {sorted(options)} belong to a source; an encoder is given, already built"
            )
        return encoder_or_source
    return create_encoder(encoder_or_source, **options)


def _check_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise ShapeError(f"num_classes is {num_classes}: give at least 2 (background counts as one)")
