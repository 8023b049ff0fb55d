"""Networks for pretext tasks: an encoder with a head that restores the volume."""

from typing import Any

from torch import Tensor, nn

from medi3d.errors import ConfigError
from medi3d.inflation.network import Inflated
from medi3d.models.networks import NetworkSettings, create_network
from medi3d.models.segmenter import finest_head


class NoView(nn.Module):
    """Replaces the decoder's own view of the input, so that everything restored went through the encoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, volume: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> zeros `(B, channels, D, H, W)`."""
        return volume.new_zeros(volume.shape[0], self.channels, *volume.shape[2:])


def create_pretext_network(settings: NetworkSettings, outputs: int, **options: Any) -> nn.Module:
    """Encoder and a decoder without a view of the input: `(B, C, D, H, W)` -> `(B, outputs, D, H, W)`.

    Args:
        settings: the network.
        outputs: channels of the output.
        options: `read_weights`, `proof`, `contract` and `size` of `create_network`.

    Raises:
        ConfigError: the encoder cannot be saved as an artifact.
    """
    # A segmenter needs at least two classes; its heads are replaced anyway.
    network: Any = create_network(settings, "segmentation", max(2, outputs), **options)
    if not isinstance(network.encoder, Inflated):
        raise ConfigError(
            f"network.source is {settings.source!r}: it is 3D from the start, and pretraining keeps inflated "
            "encoders (inception_v1, timm:NAME, torchvision:NAME, monai:NAME or an artifact of these)"
        )
    network.heads = nn.ModuleList([finest_head(network.decoder, outputs)])
    if network.decoder.has_input_branch:
        network.decoder.input_branch = NoView(network.decoder.out_channels[0])
    return network
