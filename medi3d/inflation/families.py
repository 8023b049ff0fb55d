"""Where each network family steps along depth: tables keyed by the module that defines the family.

Most networks step along depth where they step in-plane. Some read the batch size at one point and
use it at another, so a step in between would silently mix slices. The tables list these families, and the
proof checks the result.
"""

from collections.abc import Callable
from typing import Any, Literal

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
"""Stems of many layers whose steps all move to the network's entry, see `rules.tubelet.hoist`."""

HELD: dict[str, Callable[[Any], bool]] = {
    "timm.models.cpubone.ConvAttention": lambda layer: True,
    # its last stage returns tokens, which the network reshapes with the previous stage's batch size
    "timm.models.efficientformer.EfficientFormerStage": lambda stage: any(
        type(block).__name__ == "Flat" for block in stage.blocks
    ),
    "timm.models.efficientformer_v2.Attention2d": lambda layer: True,
    "timm.models.lowformer.ConvAttention": lambda layer: True,
    "timm.models.pvt_v2.Attention": lambda layer: True,
    "timm.models.twins.GlobalSubSampleAttn": lambda layer: True,
    "timm.models.volo.OutlookAttention": lambda layer: True,
}
"""Layers that shrink keys, values or windows between reading the batch size and using it: no step inside.

From the full name of the class to a condition on the layer. Layers that also shrink their output are in
`rules.stepping`.
"""


def is_hoisted(layer: nn.Module) -> bool:
    """Whether the layer is a stem of `HOISTED`."""
    return any(name in HOISTED for name in _names(layer))


def is_held(layer: nn.Module) -> bool:
    """Whether the layer is one of `HELD`."""
    return any(HELD[name](layer) for name in _names(layer) if name in HELD)


def _names(layer: nn.Module) -> list[str]:
    return [f"{base.__module__}.{base.__qualname__}" for base in type(layer).__mro__]


def pacing_of(network: nn.Module) -> Pacing:
    """The strictest pacing of the network and the networks inside it; borrowed blocks do not count."""
    networks = [m for m in network.modules() if m is network or hasattr(m, "forward_intermediates")]
    found = {PACING.get(type(m).__module__, "natural") for m in networks}
    return "none" if "none" in found else "entry" if "entry" in found else "natural"
