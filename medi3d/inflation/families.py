"""Where a network family takes its steps along depth: a table, by the module that defines the family.

Most networks step along depth where they step in-plane. Some read the batch size at one point and
use it at another, so that a step in between would silently mix slices: the tables say so, and the
proof holds them to account.
"""

from typing import Literal

from torch import nn

Pacing = Literal["natural", "entry", "none"]
"""natural: where the network steps in-plane. entry: all at the patch embedding, as tubelets.
none: nowhere; every level keeps all slices."""

PACING: dict[str, Pacing] = {
    # read the batch size before the patch embedding, or after it, and reshape by it at every level
    "timm.models.beit": "entry",
    "timm.models.cait": "entry",
    "timm.models.coat": "entry",
    "timm.models.convit": "entry",
    "timm.models.deit": "entry",
    "timm.models.eva": "entry",
    "timm.models.mlp_mixer": "entry",
    "timm.models.mvitv2": "entry",
    "timm.models.tnt": "entry",
    "timm.models.twins": "entry",
    "timm.models.vision_transformer": "entry",
    "timm.models.vision_transformer_relpos": "entry",
    "timm.models.xcit": "entry",
    # the same, with two stems of unequal strides
    "timm.models.crossvit": "none",
}

HOISTED = {"timm.layers.hybrid_embed.HybridEmbed", "timm.models.xcit.ConvPatchEmbed"}
"""Stems of many layers, all of whose steps are taken between the entry and the first other layer."""

HELD = {
    "timm.models.cpubone.ConvAttention",
    "timm.models.efficientformer_v2.Attention2d",
    "timm.models.lowformer.ConvAttention",
    "timm.models.pvt_v2.Attention",
    "timm.models.twins.GlobalSubSampleAttn",
    "timm.models.volo.OutlookAttention",
}
"""Layers that shrink keys, values or windows between reading the batch size and using it: no step inside.

Those that also shrink their output are in `rules.stepping`.
"""

FUNCTIONAL_POOLS = {"timm.models.inception_v3"}
"""Families that step by a pool called as a function, beside a strided convolution."""


def has_functional_pools(network: nn.Module) -> bool:
    """Whether functional pools must be spread along depth for the branches to meet."""
    return any(type(module).__module__ in FUNCTIONAL_POOLS for module in network.modules())


def named(layer: nn.Module, table: set[str]) -> bool:
    """Whether the layer's class, or one that it is made from, is in a table of full names."""
    return any(f"{base.__module__}.{base.__qualname__}" in table for base in type(layer).__mro__)


def pacing_of(network: nn.Module) -> Pacing:
    """The strictest pacing of the families whose networks it is made of; a borrowed block does not count."""
    networks = [m for m in network.modules() if m is network or hasattr(m, "forward_intermediates")]
    found = {PACING.get(type(m).__module__, "natural") for m in networks}
    return "none" if "none" in found else "entry" if "entry" in found else "natural"
