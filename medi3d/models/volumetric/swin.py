"""VoCo's encoder: MONAI's SwinUNETR up to its decoder."""

from collections.abc import Iterator
from typing import Any

from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn

from medi3d.errors import ShapeError
from medi3d.models.volumetric.encoder import VolumetricEncoder, from_xyz_of_ras, to_xyz_of_ras

LEVELS = 6
_BLOCKS = ("encoder1", "encoder2", "encoder3", "encoder4", None, "encoder10")
"""Layer of each map after the transformer; the fifth map is the transformer's own."""


class SwinEncoder(VolumetricEncoder):
    """The encoder of SwinUNETR-V2 (He et al. 2023, MICCAI), for VoCo (Wu et al. 2024, arXiv:2402.17300).

    Maps at strides 1, 2, 4, ... 32. It was trained on axes (x, y, z) in RAS, and neither windows that shift
    nor merged patches can be turned in the weights: the volume is turned for it and its maps are turned back.

    Args:
        width: channels of the first map: 48 (B), 96 (L) or 192 (H).
        in_channels: channels of the input.
        levels: number of maps to return; None: all six.
    """

    def __init__(self, width: int, in_channels: int = 1, levels: int | None = None) -> None:
        super().__init__()
        net: Any = SwinUNETR(in_channels, 1, feature_size=width, use_v2=True)
        self.in_channels, self.normaliser, self.normalize = in_channels, None, net.normalize
        self.swinViT = net.swinViT
        self.stages = LEVELS - 2 if levels is None else max(0, min(levels, LEVELS) - 2)
        for stage in range(self.stages + 1, LEVELS - 1):
            delattr(self.swinViT, f"layers{stage}")
            delattr(self.swinViT, f"layers{stage}c")
        if levels == 1:
            del self.swinViT
        for name in _BLOCKS[:levels]:
            if name is not None:
                self.add_module(name, getattr(net, name))
        self.out_channels = [width, width, 2 * width, 4 * width, 8 * width, 16 * width][:levels]
        self.strides = [(2**level,) * 3 for level in range(LEVELS)][:levels]

    def maps(self, volume: Tensor) -> list[Tensor]:
        """Maps of the levels."""
        size, coarsest = volume.shape[2:], self.strides[-1][0]
        if max(size) <= coarsest:
            raise ShapeError(
                f"a volume of {tuple(size)} voxels is too small for SwinUNETR: instance norms at stride "
                f"{coarsest} need two positions, so one axis needs {coarsest + 1} voxels"
            )
        volume = to_xyz_of_ras(volume)
        maps = []
        for name, x in zip(_BLOCKS[: len(self.strides)], (volume, *self._tokens(volume)), strict=True):
            block: nn.Module = nn.Identity() if name is None else self.get_submodule(name)
            maps.append(from_xyz_of_ras(block(x)))
        return maps

    def _tokens(self, volume: Tensor) -> Iterator[Tensor]:
        """Outputs of the patch embedding and of each transformer stage, normalised over channels."""
        if len(self.strides) < 2:
            return
        swin: Any = self.swinViT
        x = swin.pos_drop(swin.patch_embed(volume))
        yield swin.proj_out(x, self.normalize)
        for stage in range(1, self.stages + 1):
            x = getattr(swin, f"layers{stage}c")[0](x.contiguous())
            x = getattr(swin, f"layers{stage}")[0](x.contiguous())
            yield swin.proj_out(x, self.normalize)
