"""Natively 3D networks in the proof: depth is temporarily padded by replication.

Libraries pad depth with zeros, as they pad height and width. That spoils boring volumes at both ends,
whatever the kernels are. To prove the kernels alone, the same number of slices is added before each layer
by repeating its end slices, and the layer's own padding is set to in-plane only.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from medi3d.axes import to_triple
from medi3d.inflation.fold import pad_depth

Padding = tuple[int, ...]


@contextmanager
def replicated_depth(network: nn.Module) -> Iterator[bool]:
    """While active, the 3D layers of `network` pad depth by replication; yields whether any layer pads depth.

    `nn.Conv3d`, `nn.AvgPool3d` and `nn.ConstantPad3d` are known. Max-pools pad with minus infinity, which
    is never the maximum, so they need no change.
    """
    with ExitStack() as undo:
        changed = False
        for layer in network.modules():
            if any(_depth_padding(layer)):
                undo.enter_context(_replicated(layer))
                changed = True
        yield changed


@contextmanager
def _replicated(layer: Any) -> Iterator[None]:
    before, after = _depth_padding(layer)
    own: Padding = layer.padding
    layer.padding = (*own[:4], 0, 0) if isinstance(layer, nn.ConstantPad3d) else (0, *to_triple(own)[1:])

    def add_slices(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (pad_depth(inputs[0], before, after, "replicate"), *inputs[1:])

    hook = layer.register_forward_pre_hook(add_slices, prepend=True)
    try:
        yield
    finally:
        hook.remove()
        layer.padding = own


def _depth_padding(layer: Any) -> tuple[int, int]:
    """Slices that a 3D layer adds before and after; (0, 0) for every other layer."""
    if isinstance(layer, nn.ConstantPad3d):
        return layer.padding[4], layer.padding[5]  # torch lists the last axis first
    zeros = isinstance(layer, nn.Conv3d) and layer.padding_mode == "zeros"
    if (zeros and not isinstance(layer.padding, str)) or isinstance(layer, nn.AvgPool3d):
        depth = to_triple(layer.padding)[0]
        return depth, depth
    return 0, 0
