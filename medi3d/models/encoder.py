"""What decoders and heads need to know about an encoder, like `timm`'s `FeatureInfo` for 2D networks."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from medi3d.axes import Triple
from medi3d.errors import SourceError


@runtime_checkable
class Encoder(Protocol):
    """A network from a volume to feature maps, fine to coarse: any module with these attributes."""

    @property
    def in_channels(self) -> int:
        """Channels of the volume."""

    @property
    def out_channels(self) -> Sequence[int]:
        """Channels of each map."""

    @property
    def strides(self) -> Sequence[Triple]:
        """Voxels of the input per position of each map, as (depth, height, width)."""

    def __call__(self, volume: Tensor, /) -> list[Tensor]:
        """`(B, C, D, H, W)` -> maps `(B, C', D', H', W')`."""


def as_encoder(network: nn.Module) -> Encoder:
    """Return the network if it declares an encoder's attributes.

    Raises:
        SourceError: it does not; the message names what is missing.
    """
    missing = [name for name in ("in_channels", "out_channels", "strides") if not hasattr(network, name)]
    if missing or not isinstance(network, Encoder):
        raise SourceError(
            f"{type(network).__name__} is not an encoder: it lacks {', '.join(missing)}; "
            "medi3d.create_encoder makes one from a 2D network"
        )
    return network
