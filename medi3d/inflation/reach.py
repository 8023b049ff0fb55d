"""Stride and receptive field of each output of an inflated network, along each axis.

One slice runs through the network as a tensor that carries its *reach*: how many voxels of the
input one position sees (the receptive field), and how many lie between neighbouring positions (the
stride). Layers with a rule widen it by `(kernel − 1) · dilation · stride`; every other operation
passes on the widest field of its inputs, and the smallest stride. Statistics over the whole slice
(squeeze-excitation, global context, attention) see everything and are not counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from medi3d.axes import Triple
from medi3d.errors import InexactError, first_line
from medi3d.inflation.fold import Fold
from medi3d.inflation.rules import Rule


@dataclass(frozen=True)
class Level:
    """One output of an inflated network, axes as (depth, height, width)."""

    channels: int
    stride: Triple
    """Voxels of the input between neighbouring positions."""
    reach: Triple
    """Voxels of the input that one position sees, layers with a rule counted."""
    extents: tuple[int | None, int | None] = (None, None)
    """Positions along height and width for the image that was measured; None: it is no map."""


@dataclass(frozen=True)
class _Reach:
    field: Triple = (1, 1, 1)
    step: Triple = (1, 1, 1)

    def through(self, rule: Rule) -> "_Reach":
        kernel = (max(rule.depth.kernel, 1), *rule.kernel_2d)  # attention over all slices has none
        stride = (rule.depth.stride, *rule.stride_2d)
        dilation = (rule.depth.dilation, *rule.dilation_2d)
        field = [
            f + (k - 1) * d * s for f, k, d, s in zip(self.field, kernel, dilation, self.step, strict=True)
        ]
        if rule.kind == "upsample":
            step = [max(1, s // t) for s, t in zip(self.step, stride, strict=True)]
        else:
            step = [s * t for s, t in zip(self.step, stride, strict=True)]
        return _Reach(tuple(field), tuple(step))  # type: ignore[arg-type]

    def join(self, other: "_Reach") -> "_Reach":
        """Of two that meet in one operation: a coarser one (keys, a gate) serves the places of the finer."""
        return _Reach(
            tuple(map(max, self.field, other.field)),  # type: ignore[arg-type]
            tuple(map(min, self.step, other.step)),  # type: ignore[arg-type]
        )


class _Carrier(Tensor):
    """A tensor that carries its reach through any operation."""

    reach: _Reach

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        met = [value.reach for value in tree_flatten((args, kwargs))[0] if hasattr(value, "reach")]
        reach = reduce(_Reach.join, met) if met else _Reach()

        def carry(value: Any) -> Any:
            if isinstance(value, _Carrier):
                value.reach = reach
            return value

        return tree_map(carry, result)


@torch.no_grad()
def measure_levels(inflated: nn.Module, fold: Fold, size: int) -> list[Level]:
    """Channels, stride and receptive field of every output of an inflated network.

    Args:
        inflated: has `network`, `run_folded`, `in_channels`, and rules for its layers with depth.
        fold: of the network.
        size: height and width of an image that it takes, in pixels.

    Raises:
        InexactError: it cannot run, for branches that should meet have different depths.
    """
    declared: Any = inflated
    network: nn.Module = declared.network
    rules = [m for m in network.modules() if isinstance(m, Rule) and m.kind not in ("statistics", "other")]
    slices = _slices(rules, size)
    outputs = _run(declared, fold, rules, size, slices)
    if slices < size and any(_is_finer(output, size) for output in outputs):
        # Enlarged where no rule saw it: whether depth is too, only a deep volume tells.
        slices = size
        outputs = _run(declared, fold, rules, size, slices)
    return [Level(o.shape[1], _stride(o, size, slices), o.reach.field, _extents(o)) for o in outputs]


def _run(declared: Any, fold: Fold, rules: list[Rule], size: int, slices: int) -> list[_Carrier]:
    """The outputs for a volume of zeros, each with its reach and with its depth in rows of the batch."""
    network: nn.Module = declared.network
    parameter = next(network.parameters())
    shape = (1, declared.in_channels, slices, size, size)
    volume = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    training = network.training
    network.eval()
    hooks = [rule.register_forward_hook(_widen) for rule in rules]
    try:
        with fold.folded(volume) as folded:
            carrier = folded.as_subclass(_Carrier)
            carrier.reach = _Reach()
            return tree_flatten(declared.run_folded(carrier))[0]
    except RuntimeError as error:
        reason = first_line(error)
        raise InexactError(
            f"the inflated network cannot run on {slices} slices: {reason}; do its branches step alike along "
            "depth, and are there slices enough for layers without padding?"
        ) from error
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()


def _extents(output: _Carrier) -> tuple[int | None, int | None]:
    return tuple(output.shape[2:4]) if output.dim() == 4 else (None, None)  # type: ignore[return-value]


def _is_finer(output: _Carrier, size: int) -> bool:
    extents = zip(output.shape[2:4], output.reach.step[1:], strict=False)
    return any(measured_stride(size, extent, step) < step for extent, step in extents)


def _slices(rules: Sequence[Rule], size: int) -> int:
    """The number of slices on which a network can be measured.

    One is enough, unless slices are multiplied again on the way, or layers do not pad them: then twice as
    many as these see at most. `size` of them fill a gigabyte for the head of I3D, with its 1024 channels.
    """
    if any(rule.kind == "upsample" and rule.depth.stride > 1 for rule in rules):
        return size
    if not any(rule.depth.padding == "valid" for rule in rules):
        return 1
    seen = 1 + sum((max(rule.depth.kernel, 1) - 1) * rule.depth.dilation for rule in rules)
    return min(size, 2 * seen * math.prod(rule.depth.stride for rule in rules))


def _stride(output: _Carrier, size: int, slices: int) -> Triple:
    """The step of the rules along each axis, corrected by the size of the map where they saw another."""
    depth, height, width = output.reach.step
    if slices > 1:  # of one volume, rows are slices
        depth = measured_stride(slices, output.shape[0], depth)
    if output.dim() >= 4:
        height = measured_stride(size, output.shape[2], height)
        width = measured_stride(size, output.shape[3], width)
    return (depth, height, width)


def measured_stride(size: int, extent: int, step: int) -> int:
    """Voxels per position of a map with `extent` positions for `size` voxels, where rules stepped by `step`.

    Padding rounds the extent, so only a difference near two counts, and only on maps of some size.
    """
    ratio = size / extent / step
    if extent < 4 or 1 / 1.75 < ratio < 1.75:
        return step
    near = round(step * 2.0 ** round(math.log2(ratio)))
    return near if near and -(-size // near) == extent else max(1, round(size / extent))


def _widen(rule: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    assert isinstance(rule, Rule)
    if hasattr(inputs[0], "reach"):  # positions are computed without the image
        for part in tree_flatten(output)[0]:
            if isinstance(part, _Carrier):
                part.reach = inputs[0].reach.through(rule)
    return output
