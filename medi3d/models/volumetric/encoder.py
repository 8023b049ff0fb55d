"""The base class of natively 3D encoders, and the turns between their axes and ours."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from medi3d.axes import Triple, check_volume
from medi3d.models.contract import Normaliser


@dataclass
class VolumetricReport:
    """The source of a 3D encoder, and the report on its weights."""

    source: str
    parameters: int
    weights: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(vars(self))


class VolumetricEncoder(nn.Module):
    """An encoder's declarations and input checks; subclasses define `maps`."""

    report: VolumetricReport
    in_channels: int
    out_channels: list[int]
    strides: list[Triple]
    normaliser: Normaliser | None

    @property
    def filled(self) -> nn.Module:
        """The network whose tensors weights fill."""
        return self

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


def to_xyz_of_ras(volume: Tensor) -> Tensor:
    """`(B, C, D, H, W)` -> axes (x to right, y to anterior, z to superior), as MONAI's RAS volumes have."""
    return volume.flip(3, 4).permute(0, 1, 4, 3, 2)


def from_xyz_of_ras(volume: Tensor) -> Tensor:
    """Undo `to_xyz_of_ras`."""
    return volume.permute(0, 1, 4, 3, 2).flip(3, 4)
