"""Where a network family takes its steps along depth: a table, by the module that defines the family.

Most networks step along depth where they step in-plane. Some read the batch size at one point and
use it at another, so that a step in between would silently mix slices: the table says so, and the
proof holds it to account.
"""

from typing import Literal

from torch import nn

Pacing = Literal["natural", "entry", "none"]
"""natural: where the network steps in-plane. entry: all at the patch embedding, as tubelets.
none: nowhere; every level keeps all slices."""

PACING: dict[str, Pacing] = {
    # read the batch size before the patch embedding and reshape by it afterwards
    "timm.models.beit": "entry",
    "timm.models.cait": "entry",
    "timm.models.convit": "entry",
    "timm.models.deit": "entry",
    "timm.models.eva": "entry",
    "timm.models.mlp_mixer": "entry",
    "timm.models.vision_transformer": "entry",
    "timm.models.vision_transformer_relpos": "entry",
    # the same, but with overlapping stems, several stems, or stems made of many layers
    "timm.models.coat": "none",
    "timm.models.cpubone": "none",
    "timm.models.crossvit": "none",
    "timm.models.efficientformer_v2": "none",
    "timm.models.pvt_v2": "none",
    "timm.models.tnt": "none",
    "timm.models.twins": "none",
    "timm.models.vision_transformer_hybrid": "none",
    "timm.models.vitamin": "none",
    "timm.models.volo": "none",
    "timm.models.xcit": "none",
}


FUNCTIONAL_POOLS = {"timm.models.inception_v3"}
"""Families that step by a pool called as a function, beside a strided convolution."""


def has_functional_pools(network: nn.Module) -> bool:
    """Whether functional pools must be spread along depth for the branches to meet."""
    return any(type(module).__module__ in FUNCTIONAL_POOLS for module in network.modules())


def pacing_of(network: nn.Module) -> Pacing:
    """The strictest pacing of the families whose modules the network is made of."""
    found = {PACING.get(type(module).__module__, "natural") for module in network.modules()}
    return "none" if "none" in found else "entry" if "entry" in found else "natural"
