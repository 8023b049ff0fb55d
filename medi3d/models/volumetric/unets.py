"""Encoders of U-Nets: Models Genesis' and SuPreM's, nnU-Net's, CT-FM's SegResNet, anatomix'."""

from collections.abc import Sequence

from monai.networks.nets.segresnet_ds import SegResEncoder
from torch import Tensor, nn

from medi3d.errors import ShapeError
from medi3d.models.nnunet import FEATURES, NnUNetEncoder
from medi3d.models.volumetric.encoder import VolumetricEncoder


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

    def __init__(
        self,
        residual: bool,
        in_channels: int = 1,
        levels: int | None = None,
        *,
        features: Sequence[int] = FEATURES,
    ) -> None:
        NnUNetEncoder.__init__(
            self, 3, residual=residual, in_channels=in_channels, levels=levels, features=features
        )
        self.in_channels, self.normaliser = in_channels, None
        self.out_channels = list(features[:levels])
        self.strides = [(2**i, 2**i, 2**i) for i in range(len(self.out_channels))]

    def maps(self, volume: Tensor) -> list[Tensor]:
        """One map per stage."""
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


class SegRes(VolumetricEncoder, SegResEncoder):  # type: ignore[misc]
    """CT-FM's encoder: MONAI's SegResEncoder (Myronenko 2018, arXiv:1810.11654) with batch norms.

    Maps at strides 1, 2, 4, 8 and 16. Its axes are (superior, posterior, left), like ours.
    """

    BLOCKS = (1, 2, 2, 4, 4)

    def __init__(
        self,
        in_channels: int = 1,
        levels: int | None = None,
        *,
        width: int = 32,
        blocks: Sequence[int] = BLOCKS,
    ) -> None:
        SegResEncoder.__init__(
            self, 3, init_filters=width, in_channels=in_channels, blocks_down=tuple(blocks[:levels])
        )
        self.in_channels, self.normaliser = in_channels, None
        self.out_channels = [width << level for level in range(len(self.blocks_down))]
        self.strides = [(2**level,) * 3 for level in range(len(self.blocks_down))]

    def maps(self, volume: Tensor) -> list[Tensor]:
        """One map per level."""
        return SegResEncoder.forward(self, volume)


class Anatomix(VolumetricEncoder):
    """The encoder of anatomix' U-Net (Dey et al. 2024, arXiv:2411.02372), a list of layers as published.

    Two 3×3×3 convolutions a level (three at the first), padded by reflection; maps at strides 1, 2, 4, ...

    Args:
        in_channels: channels of the input.
        levels: number of maps to return; None: all.
        width: channels of the first level; each next has twice as many.
        downs: number of times the resolution is halved.
        dev: the larger network of 2026: instance norms without parameters (epsilon 1e-2), average pools.
    """

    def __init__(
        self,
        in_channels: int = 1,
        levels: int | None = None,
        *,
        width: int = 16,
        downs: int = 4,
        dev: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.normaliser = in_channels, None
        widths = [width << level for level in range(downs + 1)][:levels]
        self.out_channels, self.strides = widths, [(2**level,) * 3 for level in range(len(widths))]
        layers = _reflecting(in_channels, width, dev)
        self.ends: list[int] = []
        for level, after in enumerate(widths):
            if level:
                layers.append(nn.AvgPool3d(2) if dev else nn.MaxPool3d(2))
            layers += _reflecting(widths[level - 1] if level else width, after, dev)
            layers += _reflecting(after, after, dev)
            self.ends.append(len(layers) - 1)
        self.model = nn.Sequential(*layers)

    def maps(self, volume: Tensor) -> list[Tensor]:
        """The last map of every level."""
        size, coarsest = volume.shape[2:], self.strides[-1][0]
        if min(size) < 2 * coarsest:
            raise ShapeError(
                f"a volume of {tuple(size)} voxels is too small for anatomix: it pads by reflection, so each "
                f"axis needs {2 * coarsest} voxels"
            )
        maps: list[Tensor] = []
        for number, layer in enumerate(self.model):
            volume = layer(volume)
            if number in self.ends:
                maps.append(volume)
        return maps


def _reflecting(before: int, after: int, dev: bool) -> list[nn.Module]:
    conv = nn.Conv3d(before, after, 3, padding="same", padding_mode="reflect", bias=dev)
    # An activation in place would overwrite a map that is returned.
    return [conv, nn.InstanceNorm3d(after, eps=1e-2) if dev else nn.BatchNorm3d(after), nn.ReLU()]
