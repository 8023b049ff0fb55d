"""Natively 3D encoders, for weights that were trained on volumes or clips.

    medicalnet:resnetN  MedicalNet's ResNets (Chen et al. 2019, "Med3D", arXiv:1904.00625), N = 10 ... 200
    unet3d              the U-Net of Models Genesis (Zhou et al. 2019, arXiv:1908.06912) and of SuPreM
                        (Li et al. 2024, arXiv:2501.11253)
    nnunet3d:plain, nnunet3d:residual
                        nnU-Net's encoders, see `nnunet.py`; key map `nnunet` for its checkpoints
    segresnet3d         CT-FM's (Pai et al. 2025, arXiv:2501.09001)
    swinunetr3d:WIDTH   VoCo's (Wu et al. 2024, arXiv:2402.17300), WIDTH = 48, 96, 192 for B, L, H
    anatomix, anatomix:dev
                        Dey et al. 2024, arXiv:2411.02372
    merlin              Blankemeier et al. 2024, arXiv:2406.06512: an inflated ResNet-152
    r3d:resnetN         3D-ResNets-PyTorch (Kataoka et al. 2020, arXiv:2004.04968), N = 18 ... 200
    ircsn:resnetN       ir-CSN (Tran et al. 2019, arXiv:1904.02811), N = 50, 152

Parameters have the published names. Each encoder takes `(B, C, D, H, W)` and returns a list of maps, fine to
coarse, the last of each resolution. It has `.in_channels`, `.out_channels` and `.strides`.
"""

import logging
from collections.abc import Callable
from functools import partial

from medi3d.errors import ShapeError, SourceError
from medi3d.models.contract import Normaliser, contract_of
from medi3d.models.volumetric.encoder import VolumetricEncoder, VolumetricReport
from medi3d.models.volumetric.inflated import Merlin
from medi3d.models.volumetric.resnets import R3D, IrCSN, MedicalNet
from medi3d.models.volumetric.swin import SwinEncoder
from medi3d.models.volumetric.unets import Anatomix, NnUNet3d, SegRes, UNet3d
from medi3d.weights.catalogue import get_row
from medi3d.weights.keymaps import IRCSN_DEPTHS, MEDICALNET_DEPTHS, R3D_DEPTHS
from medi3d.weights.load import load_weights

log = logging.getLogger("medi3d")

VOLUMETRIC: dict[str, Callable[[int, int | None], VolumetricEncoder]] = {
    **{f"medicalnet:resnet{depth}": partial(MedicalNet, depth) for depth in MEDICALNET_DEPTHS},
    "unet3d": UNet3d,
    "nnunet3d:plain": partial(NnUNet3d, False),
    "nnunet3d:residual": partial(NnUNet3d, True),
    "segresnet3d": SegRes,
    **{f"swinunetr3d:{width}": partial(SwinEncoder, width) for width in (48, 96, 192)},
    "anatomix": Anatomix,
    "anatomix:dev": partial(Anatomix, width=32, downs=5, dev=True),
    "merlin": Merlin,
    **{f"r3d:resnet{depth}": partial(R3D, depth) for depth in R3D_DEPTHS},
    **{f"ircsn:resnet{depth}": partial(IrCSN, depth) for depth in IRCSN_DEPTHS},
}
"""Natively 3D sources by name: `(in_channels, levels)` -> encoder."""


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
        WeightsError: see `load_weights`.
    """
    if in_channels < 1:
        raise ShapeError(f"a network needs at least 1 input channel, not {in_channels}")
    if weights == "timm":
        raise SourceError(f"weights 'timm' are for sources timm:NAME; {source!r} is not one")
    unread = not read_weights and str(weights).startswith("file:")  # the file does not describe its input
    row = None if weights is None or unread else get_row(weights)
    expected, unknown = contract_of(source, weights, row) if contract and row is not None else (None, "")
    normaliser = None if expected is None else Normaliser(expected, in_channels)
    inside = in_channels if normaliser is None else normaliser.channels
    encoder = VOLUMETRIC[source](inside, levels)
    if levels is not None and levels > len(encoder.strides):
        raise SourceError(f"levels is {levels}: {source} has {len(encoder.strides)} feature maps")
    encoder.in_channels, encoder.normaliser = in_channels, normaliser
    encoder.report = VolumetricReport(source, sum(p.numel() for p in encoder.parameters()), {"name": "none"})
    if row is not None:
        report = load_weights(encoder.filled, row).to_dict() if read_weights else {}
        encoder.report.weights = {"name": row.name, "licences": list(row.licences), **report}
        if unknown:
            log.warning(unknown)
            encoder.report.weights.setdefault("notes", []).append(unknown)
        if normaliser is not None:
            encoder.report.weights["contract"] = normaliser.to_dict()
    return encoder


__all__ = ["VOLUMETRIC", "VolumetricEncoder", "VolumetricReport", "create_volumetric"]
