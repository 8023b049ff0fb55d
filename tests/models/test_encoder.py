"""What an encoder declares; a network that does not is refused in one line."""

import pytest
from torch import nn

from medi3d.errors import SourceError
from medi3d.inflation import inflate
from medi3d.models.encoder import Encoder, as_encoder
from medi3d.models.encoders import PlainEncoder
from medi3d.models.volumetric import create_volumetric


@pytest.mark.parametrize(
    "make",
    [
        lambda: PlainEncoder(1),
        lambda: inflate(nn.Conv2d(1, 2, 3)),
        lambda: create_volumetric("unet3d", levels=2),
    ],
    ids=["plain", "inflated", "volumetric"],
)
def test_every_kind_of_encoder_is_one(make):
    network = make()
    assert as_encoder(network) is network
    assert isinstance(network, Encoder)


def test_what_is_missing_is_named():
    with pytest.raises(
        SourceError, match=r"Conv3d is not an encoder: it lacks strides; medi3d\.create_encoder"
    ):
        as_encoder(nn.Conv3d(1, 2, 3))
