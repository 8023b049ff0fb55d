"""Encoders that are 3D from the start, for weights that were trained on volumes: nothing to inflate.

    medicalnet:resnetN  MedicalNet's ResNets (Chen et al. 2019, "Med3D", arXiv:1904.00625), N = 10 ... 200
    unet3d              the U-Net of Models Genesis (Zhou et al. 2019, arXiv:1908.06912) and of SuPreM
                        (Li et al. 2024, arXiv:2501.11253)
    nnunet3d:plain, nnunet3d:residual
                        nnU-Net's encoders, see `nnunet.py`; key map `nnunet` for its checkpoints

Parameters have the published names. Each encoder takes `(B, C, D, H, W)` and returns a list of maps, fine to
coarse, the last of each resolution; it has `.in_channels`, `.out_channels` and `.strides`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from monai.networks.nets.resnet import ResNetBottleneck, ResNetFeatures
from torch import Tensor, nn

from medi3d.axes import Triple, check_volume
from medi3d.errors import ShapeError, SourceError
from medi3d.models.contract import Normaliser, contract_of
from medi3d.models.nnunet import FEATURES, NnUNetEncoder
from medi3d.weights.catalogue import get_row
from medi3d.weights.keymaps import MEDICALNET_DEPTHS
from medi3d.weights.load import load_weights

log = logging.getLogger("medi3d")


@dataclass
class VolumetricReport:
    """Where a 3D encoder comes from, and what became of the weights that it was given."""

    source: str
    parameters: int
    weights: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(vars(self))


class VolumetricEncoder(nn.Module):
    """What an encoder declares, and the checks of its input; subclasses have `maps`."""

    report: VolumetricReport
    in_channels: int
    out_channels: list[int]
    strides: list[Triple]
    normaliser: Normaliser | None

    def maps(self, volume: Tensor) -> list[Tensor]:
        """Feature maps of a volume that has been normalised, fine to coarse."""
        raise NotImplementedError

    def forward(self, volume: Tensor) -> list[Tensor]:
        """`(B, C, D, H, W)` -> maps `(B, C', D', H', W')`, fine to coarse.

        Raises:
            ShapeError: the input is not 5-D, is empty, or has another number of channels.
        """
        check_volume(volume.shape, self.in_channels)
        return self.maps(volume if self.normaliser is None else self.normaliser(volume))


class MedicalNet(VolumetricEncoder, ResNetFeatures):  # type: ignore[misc]
    """A ResNet of MedicalNet: MONAI's, with dilation in place of the last two stages' strides, as published.

    Maps: the stem at stride 2, `layer1` at 4, and `layer4` at 8. Depths 18 and 34 have shortcuts without
    parameters (type A); unlike the published code, gradients flow through them.
    """

    def __init__(self, depth: int, in_channels: int = 1, levels: int | None = None) -> None:
        ResNetFeatures.__init__(self, f"resnet{depth}", pretrained=False, in_channels=in_channels)
        for stage, stride, dilation in ((self.layer2, 2, 1), (self.layer3, 1, 2), (self.layer4, 1, 4)):
            _set_strides(stage, stride, dilation)
        self.in_channels, self.normaliser = in_channels, None
        width = ResNetBottleneck.expansion if depth >= 50 else 1
        self.out_channels = [64, 64 * width, 512 * width][:levels]
        self.strides = [(2, 2, 2), (4, 4, 4), (8, 8, 8)][:levels]
        unused = ("layer1", "layer2", "layer3", "layer4") if levels == 1 else ("layer2", "layer3", "layer4")
        for name in unused if len(self.strides) < 3 else ():
            delattr(self, name)

    def maps(self, volume: Tensor) -> list[Tensor]:
        """Maps at strides 2, 4 and 8."""
        maps = [self.act(self.bn1(self.conv1(volume)))]
        if len(self.strides) > 1:
            maps.append(self.layer1(self.maxpool(maps[0])))
        if len(self.strides) > 2:
            maps.append(self.layer4(self.layer3(self.layer2(maps[1]))))
        return maps


def _set_strides(stage: nn.Sequential, stride: int, dilation: int) -> None:
    """Give a stage its published stride and dilation, and shortcuts of type A a module of their own."""
    first: Any = stage[0]
    for block in stage.children():
        for conv in block.modules():
            if isinstance(conv, nn.Conv3d):
                if conv.kernel_size != (1, 1, 1):
                    conv.dilation = conv.padding = (dilation,) * 3
                if conv.stride != (1, 1, 1):
                    conv.stride = (stride,) * 3
    if isinstance(first.downsample, partial):
        first.downsample = _PaddedShortcut(first.conv1.out_channels, stride)


class _PaddedShortcut(nn.Module):
    """He et al. 2015, option A: every `stride`-th position, missing channels zero."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.channels - x.shape[1]))


class UNet3d(VolumetricEncoder):
    """The encoder of the U-Net of Models Genesis and SuPreM: two 3×3×3 convolutions a stage, max-pooling.

    Norms take the statistics of the batch in evaluation too, as published; the running ones in its
    checkpoints are never used there. Maps at strides 1, 2, 4 and 8.
    """

    STAGES = ("down_tr64", "down_tr128", "down_tr256", "down_tr512")

    def __init__(self, in_channels: int = 1, levels: int | None = None) -> None:
        super().__init__()
        self.in_channels, self.normaliser = in_channels, None
        self.out_channels = [64, 128, 256, 512][:levels]
        self.strides = [(s, s, s) for s in (1, 2, 4, 8)][:levels]
        self.pool = nn.MaxPool3d(2)
        for name, before, after in zip(
            self.STAGES, [in_channels, *self.out_channels], self.out_channels, strict=False
        ):
            self.add_module(name, _UNetStage(before, after))

    def maps(self, volume: Tensor) -> list[Tensor]:
        """Maps at strides 1, 2, 4 and 8."""
        size, coarsest = volume.shape[2:], self.strides[-1][0]
        if min(size) < coarsest or (volume.shape[0] == 1 and max(size) < 2 * coarsest):
            raise ShapeError(
                f"a volume of {tuple(size)} voxels is too small for this U-Net: its coarsest map, at stride "
                f"{coarsest}, needs two positions to take statistics over"
            )
        maps: list[Tensor] = []
        for name in self.STAGES[: len(self.strides)]:
            maps.append(self.get_submodule(name)(self.pool(maps[-1]) if maps else volume))
        return maps


class NnUNet3d(VolumetricEncoder, NnUNetEncoder):  # type: ignore[misc]
    """nnU-Net's plain or residual encoder for volumes; maps at strides 1, 2, 4, ... 32."""

    def __init__(self, residual: bool, in_channels: int = 1, levels: int | None = None) -> None:
        NnUNetEncoder.__init__(self, 3, residual=residual, in_channels=in_channels, levels=levels)
        self.in_channels, self.normaliser = in_channels, None
        self.out_channels = list(FEATURES[:levels])
        self.strides = [(2**i, 2**i, 2**i) for i in range(len(self.out_channels))]

    def maps(self, volume: Tensor) -> list[Tensor]:
        """A map of every stage."""
        return NnUNetEncoder.forward(self, volume)


class _UNetStage(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.ops = nn.Sequential(_UNetUnit(before, after // 2), _UNetUnit(after // 2, after))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops(x)


class _UNetUnit(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(before, after, 3, padding=1)
        self.bn1 = nn.BatchNorm3d(after, track_running_stats=False)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn1(self.conv1(x)))


VOLUMETRIC: dict[str, Callable[[int, int | None], VolumetricEncoder]] = {
    **{f"medicalnet:resnet{depth}": partial(MedicalNet, depth) for depth in MEDICALNET_DEPTHS},
    "unet3d": UNet3d,
    "nnunet3d:plain": partial(NnUNet3d, False),
    "nnunet3d:residual": partial(NnUNet3d, True),
}
"""Sources that are 3D from the start, by name: `(in_channels, levels)` -> encoder."""


def create_volumetric(
    source: str,
    *,
    weights: str | None = None,
    in_channels: int = 1,
    levels: int | None = None,
    contract: bool = True,
    read_weights: bool = True,
) -> VolumetricEncoder:
    """A 3D encoder of `VOLUMETRIC`, with its weights; arguments as for `create_encoder`.

    Raises:
        SourceError: more levels than there are, or `timm` as weights.
        ShapeError: fewer than one channel.
        WeightsError: as `load_weights` says.
    """
    if in_channels < 1:
        raise ShapeError(f"a network needs at least 1 input channel, not {in_channels}")
    if weights == "timm":
        raise SourceError(f"weights 'timm' are for sources timm:NAME; {source!r} is none of them")
    encoder = VOLUMETRIC[source](in_channels, levels)
    if levels is not None and levels > len(encoder.strides):
        raise SourceError(f"levels is {levels}: {source} has {len(encoder.strides)} feature maps")
    encoder.report = VolumetricReport(source, sum(p.numel() for p in encoder.parameters()), {"name": "none"})
    unread = not read_weights and str(weights).startswith("file:")  # it says nothing of its input
    if weights is not None and not unread:
        row = get_row(weights)
        report = load_weights(encoder, row).to_dict() if read_weights else {}
        encoder.report.weights = {"name": row.name, "licences": list(row.licences), **report}
        expected, unknown = contract_of(source, weights, row) if contract else (None, "")
        if unknown:
            log.warning(unknown)
            encoder.report.weights.setdefault("notes", []).append(unknown)
        if expected is not None:
            encoder.normaliser = Normaliser(expected, in_channels)
            encoder.report.weights["contract"] = encoder.normaliser.to_dict()
    return encoder
