"""Encoders, segmenters and classifiers for volumes and clips, put together from parts.

create_encoder     source + weights + plan  ->  x (B, C, D, H, W) -> list of feature maps
create_segmenter   encoder + U-Net decoder  ->  logits (B, classes, D, H, W), any size
create_classifier  encoder + linear head    ->  logits (B, classes)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock
from torch import Tensor, nn

from medi3d.axes import DEPTH, Triple
from medi3d.errors import ConfigError, ShapeError, SourceError
from medi3d.inflation.network import Inflated, inflate
from medi3d.inflation.plan import KernelPlan
from medi3d.inflation.rules import ConvRule, Rule
from medi3d.models.artifact import load_artifact
from medi3d.models.contract import normaliser_of
from medi3d.models.decoder import Decoder
from medi3d.models.registry import build_source
from medi3d.models.volumetric import VOLUMETRIC, create_volumetric
from medi3d.weights.catalogue import get_row
from medi3d.weights.load import LoadReport, load_weights

LEAN_UNET = "unet"
"""Source of the lean 3D U-Net that every comparison needs as its baseline; it has no 2D origin."""


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
    if task == "classification":
        return create_classifier(encoder, num_classes=num_classes, dropout=settings.dropout)
    return create_segmenter(
        encoder,
        num_classes=num_classes,
        channels=settings.decoder_channels,
        norm=settings.norm,
        deep_supervision=settings.deep_supervision,
    )


def create_encoder(
    source: str | nn.Module,
    *,
    weights: str | None = None,
    plan: KernelPlan | str = "isotropic",
    in_channels: int = 1,
    profile: str = "mean",
    levels: int | None = None,
    contract: bool = True,
    read_weights: bool = True,
    allow_inexact: bool = False,
) -> nn.Module:
    """A 3D encoder: `(B, C, D, H, W)` -> list of feature maps; has `.out_channels` and `.strides`.

    2D weights are loaded before inflation, 3D weights after it. Without weights the 3D kernels are
    drawn anew, so that a network "from scratch" does not start constant along depth.

    Args:
        source: `timm:NAME`, `torchvision:NAME`, `monai:NAME`, `inception_v1`; `medicalnet:NAME`,
            `unet3d`, `unet`, which are 3D from the start; the path of an artifact (which brings its own
            plan and weights); or a 2D network that returns a list of maps and keeps its weights.
        weights: a catalogue row, `timm` (timm's own), `file:PATH`, or None.
        plan: kernels along depth.
        in_channels: channels of the volumes.
        profile: depth profile, see `medi3d.inflation.kernels`.
        levels: use the first so many maps only; None: all.
        contract: take data in [-1, 1] to what the weights expect (`medi3d.models.contract`); False
            leaves that to you.
        read_weights: False builds the network for these weights, but leaves them unread.
        allow_inexact: return a network that failed its proof, with the report.

    Raises:
        SourceError, WeightsError, PlanError, InexactError: as `inflate` and `load_weights` say.
    """
    if levels is not None and levels < 1:
        raise SourceError(f"an encoder needs at least 1 level, not {levels}")
    if source == LEAN_UNET:
        if weights is not None:
            raise SourceError(f"the lean U-Net has no pretrained weights, but {weights!r} is asked for")
        return PlainEncoder(in_channels, PLAIN_CHANNELS[:levels])
    if isinstance(source, str) and source.endswith(".safetensors"):
        return _load_encoder(source, weights, in_channels, levels)
    if isinstance(source, str) and source in VOLUMETRIC:
        return create_volumetric(
            source,
            weights=weights,
            in_channels=in_channels,
            levels=levels,
            contract=contract,
            read_weights=read_weights,
        )
    net2d = _source_network(source, weights, levels, read_weights)
    unread = not read_weights and str(weights).startswith("file:")  # it says nothing of its input
    row = None if weights in (None, "timm") or unread else get_row(weights)
    report: LoadReport | None = None
    if row is not None and row.dimensions == 2 and read_weights:
        report = load_weights(net2d, row)
    pretrained_by_timm = str(source) if weights == "timm" else None
    normaliser = normaliser_of(row or pretrained_by_timm, in_channels) if contract else None
    inside = in_channels if normaliser is None else normaliser.channels
    encoder = inflate(net2d, plan, profile=profile, in_channels=inside, allow_inexact=allow_inexact)
    encoder.in_channels, encoder.normaliser = in_channels, normaliser
    if row is not None and row.dimensions == 3 and read_weights:
        report = load_weights(encoder, row)
    if isinstance(source, nn.Module):
        _check_maps(encoder, source)
    elif weights is None:
        draw_kernels(encoder)
    encoder.report.source = source if isinstance(source, str) else type(source).__name__
    if report is not None and row is not None and row.dimensions == 2:
        _tell_inflated(report, net2d, encoder.network)
    encoder.report.weights = {"name": weights or "none", **(report.to_dict() if report else {})}
    if normaliser is not None:
        encoder.report.weights["contract"] = normaliser.to_dict()
    return encoder


def _source_network(
    source: str | nn.Module, weights: str | None, levels: int | None, read_weights: bool
) -> nn.Module:
    """The 2D network to inflate, the caller's own as a copy; refuse options that it could not follow."""
    if isinstance(source, nn.Module):
        if levels is not None or weights == "timm":
            option = "levels" if levels is not None else "weights='timm'"
            raise SourceError(f"{option} belongs to a source by name; {type(source).__name__} is a network")
        return copy.deepcopy(source)
    if weights == "timm" and not source.startswith("timm:"):
        raise SourceError(f"weights 'timm' are for sources timm:NAME; {source!r} is none of them")
    return build_source(source, levels=levels, pretrained=weights == "timm" and read_weights)


@torch.no_grad()
def _check_maps(encoder: Inflated, source: nn.Module) -> None:
    """Refuse a network of the caller that returns anything but a list of feature maps."""
    size, training = encoder.report.exactness.size, encoder.training
    kernel = next(encoder.parameters())
    maps = encoder.eval()(kernel.new_zeros(1, encoder.in_channels, 1, size, size))
    encoder.train(training)
    if not isinstance(maps, list) or any(not isinstance(x, Tensor) or x.dim() != 5 for x in maps):
        raise SourceError(
            f"{type(source).__name__} is no encoder: it must return a list of feature maps (N, C, H, W), "
            "as timm's networks do with features_only=True"
        )


def _load_encoder(path: str, weights: str | None, in_channels: int, levels: int | None) -> nn.Module:
    encoder = load_artifact(path)
    if levels not in (None, len(encoder.levels)):
        raise SourceError(f"the artifact {path} has {len(encoder.levels)} levels, not {levels}")
    if weights is not None:
        raise SourceError(f"the artifact {path} has its weights; leave out {weights!r}")
    if encoder.in_channels != in_channels:
        raise SourceError(f"the artifact {path} takes {encoder.in_channels} channels, not {in_channels}")
    return encoder


def _tell_inflated(report: LoadReport, net2d: nn.Module, network: nn.Module) -> None:
    """Say of 2D weights that were loaded before inflation what inflation made of them."""
    before, after = net2d.state_dict(), network.state_dict()
    for name in list(report.matched):
        flat, deep = before[name].shape, after[name].shape
        if len(deep) == 5 and deep[1] != flat[1]:
            kind = report.adapted
        elif len(deep) == 5 and deep[2] > 1:
            kind = report.inflated
        else:
            continue
        report.matched.remove(name)
        kind.append(name)


def draw_kernels(encoder: Inflated) -> None:
    """Draw every kernel with depth anew, independent in each tap, with the variance that keeps activations.

    Where the 2D kernel has variance v, N independent taps need v/N each.
    """
    for rule in encoder.rules().values():
        taps = rule.weight.shape[2] if isinstance(rule, ConvRule) else 1
        if isinstance(rule, ConvRule) and taps > 1:
            # Over all taps its deviation is the 2D one by N; as it is; or, one tap of N filled, by √N.
            times = {"mean": taps, "repeat": 1}.get(rule.profile, taps**0.5)
            spread = float(rule.weight.detach().std()) * times if rule.weight.numel() > taps else 1.0
            nn.init.normal_(rule.weight, std=spread / taps**0.5)


PLAIN_CHANNELS = (32, 64, 128)
"""Channels of the lean U-Net's encoder, fine to coarse."""


class PlainEncoder(nn.Module):
    """The lean U-Net's encoder: one block of two 3×3×3 convolutions per level, each halving the size."""

    def __init__(self, in_channels: int, channels: Sequence[int] = PLAIN_CHANNELS) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = list(channels)
        self.strides: list[Triple] = [(2**i, 2**i, 2**i) for i in range(1, len(channels) + 1)]
        self.blocks = nn.ModuleList(
            UnetBasicBlock(3, before, after, 3, stride=2, norm_name=("instance", {"affine": True}))
            for before, after in zip([in_channels, *channels[:-1]], channels, strict=True)
        )

    def forward(self, volume: Tensor) -> list[Tensor]:
        """`(B, C, D, H, W)` -> maps at strides 2, 4, 8.

        Raises:
            ShapeError: the input is not 5-D, is empty, or has another number of channels.
        """
        if volume.dim() != 5 or volume.shape[1] != self.in_channels or 0 in volume.shape:
            raise ShapeError(
                f"this network takes (B, {self.in_channels}, D, H, W) with no empty axis, "
                f"not {tuple(volume.shape)}"
            )
        maps = []
        for block in self.blocks:
            volume = block(volume)
            maps.append(volume)
        return maps


class Segmenter(nn.Module):
    """Encoder, U-Net decoder, 1×1×1 head: `(B, C, D, H, W)` -> logits `(B, num_classes, D, H, W)`.

    Takes any size. In training mode with deep supervision it returns a list of logits, finest
    first, each at the resolution of its decoder level; otherwise one tensor.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        *,
        channels: Sequence[int] | None = None,
        norm: str = "instance",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        declared: Any = encoder
        self.encoder = encoder
        self.decoder = Decoder(declared.in_channels, declared.out_channels, declared.strides, channels, norm)
        supervised = self.decoder.out_channels if deep_supervision else self.decoder.out_channels[:1]
        self.heads = nn.ModuleList(nn.Conv3d(width, num_classes, 1) for width in supervised)
        self.coarsest: Triple = declared.strides[-1]
        whole = _drops_ends(encoder) or _moves_with_size(encoder)
        self.multiple: Triple = self.coarsest if whole else (1, 1, 1)

    def forward(self, volume: Tensor) -> Tensor | list[Tensor]:
        """`(B, C, D, H, W)` -> logits of the same size.

        Raises:
            ShapeError: the input is not 5-D, is empty, or has another number of channels.
        """
        if volume.dim() != 5 or 0 in volume.shape:
            raise ShapeError(
                f"a segmenter takes (B, C, D, H, W) with no empty axis, not {tuple(volume.shape)}"
            )
        size = volume.shape[DEPTH:]
        padded = _pad_to(volume, _padded_size(size, self.coarsest, self.multiple))
        maps = self.decoder(padded, self.encoder(padded))
        finest = self.heads[0](maps[0])[:, :, : size[0], : size[1], : size[2]]
        if not self.training or len(self.heads) == 1:
            return finest
        return [finest, *(head(x) for head, x in zip(self.heads[1:], maps[1:], strict=True))]


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


def _padded_size(size: Sequence[int], coarsest: Triple, multiple: Triple) -> list[int]:
    """The size to which a volume is padded: a multiple, and no single position at the coarsest level.

    Norms take statistics over positions, so one alone has none: the axis that lacks least gets a second.
    """
    enough = list(size)
    if all(s <= c for s, c in zip(size, coarsest, strict=True)):
        axis = min(range(3), key=lambda a: coarsest[a] - size[a])
        enough[axis] = coarsest[axis] + 1
    return [s + -s % m for s, m in zip(enough, multiple, strict=True)]


def _pad_to(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat the far ends of `(B, C, D, H, W)` up to that (depth, height, width)."""
    depth, height, width = (wanted - have for wanted, have in zip(size, volume.shape[DEPTH:], strict=True))
    if not depth + height + width:
        return volume
    return nn.functional.pad(volume, (0, width, 0, height, 0, depth), mode="replicate")


def _moves_with_size(encoder: nn.Module) -> bool:
    """Whether features lie elsewhere for odd sizes than for even ones.

    TensorFlow's "same" shares out its padding by the size of the input: before a strided layer of
    kernel 7, two voxels for an even size and three for an odd one, and so on at every level. A
    network trained on patches of one size would find all its features shifted in a volume of another.
    """
    return any(isinstance(r, Rule) and r.same and max(r.stride_2d) > 1 for r in encoder.modules())


@torch.no_grad()
def _drops_ends(encoder: nn.Module) -> bool:
    """Whether strided layers leave out voxels at the far end where a size does not divide.

    Encoders whose levels have ceil(size / stride) positions see every voxel; of the others the
    input must be padded to a multiple of the largest stride.
    """
    declared: Any = encoder
    size = [2 * max(stride) - 1 for stride in zip(*declared.strides, strict=True)]
    parameter = next(encoder.parameters())
    probe = torch.zeros(1, declared.in_channels, *size, dtype=parameter.dtype, device=parameter.device)
    training = encoder.training
    encoder.eval()
    try:
        maps = encoder(probe)
    except (RuntimeError, ShapeError):  # too small for this network, or not a multiple of what it needs
        return True
    finally:
        encoder.train(training)
    return any(
        list(x.shape[DEPTH:]) != [-(-s // t) for s, t in zip(size, stride, strict=True)]
        for x, stride in zip(maps, declared.strides, strict=True)
    )
