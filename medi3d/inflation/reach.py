"""Stride and receptive field of each output of an inflated network, along each axis.

One slice runs through the network as a tensor that carries its *reach*: how many voxels of the
input one position sees (the receptive field), and how many lie between neighbouring positions (the
stride). Layers with a rule widen it by `(kernel − 1) · dilation · stride`; every other operation
keeps the widest field and the smallest stride of its inputs. Statistics over the whole slice
(squeeze-excitation, global context, attention) see everything and are not counted.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from medi3d.axes import Triple, to_pair
from medi3d.errors import InexactError, Medi3dError, first_line
from medi3d.inflation.fold import Fold
from medi3d.inflation.rules import EnlargingRule, Rule


@dataclass(frozen=True)
class Level:
    """One output of an inflated network, axes as (depth, height, width)."""

    channels: int
    stride: Triple
    """Voxels of the input between neighbouring positions."""
    reach: Triple
    """Voxels of the input that one position sees, counting layers with a rule."""
    extents: tuple[int | None, int | None] = (None, None)
    """Positions along height and width for the measured image; None: not a map."""


@dataclass(frozen=True)
class _Reach:
    field: Triple = (1, 1, 1)
    step: Triple = (1, 1, 1)
    maps: dict[tuple[int, ...], "_Reach"] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """The first map of each in-plane size, from any operation: one table for a run."""

    def through(self, rule: Rule, after: int | None = None) -> "_Reach":
        """The reach of a layer's output; `after`: its stride along depth, if known."""
        kernel = (max(rule.depth.kernel, 1), *rule.kernel_2d)  # 0: attention over all slices
        stride = (rule.depth.stride, *rule.stride_2d)
        dilation = (rule.depth.dilation, *rule.dilation_2d)
        enlarges = rule.kind == "upsample"
        if enlarges:  # every stride-th tap of a transposed kernel meets a position
            kernel = tuple(-(-k // s) for k, s in zip(kernel, stride, strict=True))  # type: ignore[assignment]
        seen = [
            f + (k - 1) * d * s for f, k, d, s in zip(self.field, kernel, dilation, self.step, strict=True)
        ]
        axes = zip(self.step, stride, strict=True)
        step = [max(1, s // t) for s, t in axes] if enlarges else [s * t for s, t in axes]
        if after is not None:
            step[0] = after
        return _Reach(tuple(seen), tuple(step), self.maps)  # type: ignore[arg-type]

    def join(self, other: "_Reach") -> "_Reach":
        """Reach of two combined tensors: a coarser one (keys, a gate) adopts the finer stride."""
        return _Reach(
            tuple(map(max, self.field, other.field)),  # type: ignore[arg-type]
            tuple(map(min, self.step, other.step)),  # type: ignore[arg-type]
            self.maps,
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
                if value.dim() == 4:
                    reach.maps.setdefault(tuple(value.shape[-2:]), reach)
            return value

        return tree_map(carry, result)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:  # type: ignore[override]
        """Return a plain tensor: some networks keep tensors that they computed."""
        return self.detach().as_subclass(Tensor).clone()


class _Survey:
    """Follows strides and receptive fields through a run, and sets the strides that enlarging rules restore.

    An enlargement restores the resolution of the earlier map with its in-plane size, and thus that map's
    stride along depth, even where the plan held depth back. Without such a map, the plan's own factor
    counts.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.deepest: Triple = (1, 1, 1)
        self.strides: dict[tuple[int, ...], int] = {tuple(size): 1}

    def passed(self, rule: Rule, x: Any, output: Any) -> None:
        """Record that `rule` computed `output` from `x`."""
        if not hasattr(x, "reach"):  # computed without the image, as positions are
            return
        parts = [part for part in tree_flatten(output)[0] if isinstance(part, _Carrier)]
        after = self._restored(rule, x, parts[0]) if isinstance(rule, EnlargingRule) and parts else None
        for part in parts:
            part.reach = x.reach.through(rule, after)
            deepest = map(max, self.deepest, part.reach.step)
            self.deepest = tuple(deepest)  # type: ignore[assignment]
            if part.dim() == 4 and rule.kind != "attention":
                self.strides.setdefault(tuple(part.shape[-2:]), part.reach.step[0])

    def _restored(self, rule: EnlargingRule, x: Any, output: Tensor) -> int:
        before = x.reach.step[0]
        ratio, step = output.shape[-2] / x.shape[-2], rule.depth.stride
        if 1 / 1.4 < ratio < 1.4:
            after = before
        else:
            planned = max(1, before // step) if ratio > 1 else before * step
            size = tuple(output.shape[-2:])
            first = x.reach.maps.get(size)
            if first is not None and first is not x.reach:  # else this enlargement made it
                planned = first.step[0]
            after = self.strides.get(size, planned)
        passage = (self.size[0] / x.shape[-2], before, after)
        if passage not in rule.passages:
            rule.passages.append(passage)
        return after


@torch.no_grad()
def measure_levels(
    inflated: nn.Module, fold: Fold, size: int | tuple[int, int]
) -> tuple[list[Level], Triple]:
    """Channels, stride and receptive field of every output, and the largest stride inside along each axis.

    Enlarging rules record in the same run which strides along depth they restore.

    Args:
        inflated: has `network`, `run_folded`, `in_channels`, and rules for its layers with depth.
        fold: the network's fold.
        size: height and width of an image that it takes, in pixels.

    Raises:
        InexactError: the network cannot run, for example because branches that meet differ in depth.
    """
    declared: Any = inflated
    network: nn.Module = declared.network
    rules = [m for m in network.modules() if isinstance(m, Rule) and m.kind not in ("statistics", "other")]
    size = to_pair(size)
    survey, slices = _Survey(size), _slices(rules, max(size))
    outputs = _run(declared, fold, rules, survey, slices)
    if slices < max(size) and any(_is_finer(output, size) for output in outputs):
        # Enlarged where no rule saw it: only a deep volume shows whether depth is too.
        slices = max(size)
        outputs = _run(declared, fold, rules, survey, slices)
    return [_level(output, size, slices) for output in outputs if output is not None], survey.deepest


def _run(declared: Any, fold: Fold, rules: list[Rule], survey: _Survey, slices: int) -> list[Any]:
    """The outputs for a volume of zeros, each with its reach and with its depth in rows of the batch."""
    network: nn.Module = declared.network
    parameter = next(network.parameters())
    shape = (1, declared.in_channels, slices, *survey.size)
    volume = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    training = network.training
    network.eval()
    hooks = [rule.register_forward_hook(partial(_widen, survey)) for rule in rules]
    try:
        with fold.folded(volume) as folded, fold.surveyed(survey):
            carrier = folded.as_subclass(_Carrier)
            carrier.reach = _Reach()
            return tree_flatten(declared.run_folded(carrier))[0]
    except Medi3dError:
        raise
    except Exception as error:  # the network's own code may raise anything
        raise InexactError(
            f"the inflated network cannot run on {slices} slices: {first_line(error)}; do its branches "
            "have equal strides along depth, and are there enough slices for layers without padding?"
        ) from error
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()


def _extents(output: Tensor) -> tuple[int | None, int | None]:
    return tuple(output.shape[2:4]) if output.dim() == 4 else (None, None)  # type: ignore[return-value]


def _is_finer(output: Any, size: tuple[int, int]) -> bool:
    """Whether a map is finer than its layers' strides imply."""
    if not hasattr(output, "reach"):  # computed without the image: only its rows show
        return isinstance(output, Tensor)
    axes = zip(size, output.shape[2:4], output.reach.step[1:], strict=False)
    return any(measured_stride(whole, extent, step) < step for whole, extent, step in axes)


def _slices(rules: Sequence[Rule], size: int) -> int:
    """The number of slices on which a network can be measured.

    One is enough, unless layers do not pad depth: then twice the number that these see, at most `size`.
    `size` slices fill a gigabyte for the head of I3D, with its 1024 channels.
    """
    if not any(rule.depth.padding == "valid" for rule in rules):
        return 1
    seen = 1 + sum((max(rule.depth.kernel, 1) - 1) * rule.depth.dilation for rule in rules)
    return min(size, 2 * seen * math.prod(rule.depth.stride for rule in rules))


def _level(output: Any, size: tuple[int, int], slices: int) -> Level:
    """Level of one output; if made without the image (a grid), it has its size's stride and sees nothing."""
    reach: _Reach = getattr(output, "reach", _Reach())
    return Level(output.shape[1], _stride(output, reach, size, slices), reach.field, _extents(output))


def _stride(output: Tensor, reach: _Reach, size: tuple[int, int], slices: int) -> Triple:
    """The rules' step along each axis, corrected where the size of the map shows a different one."""
    depth, height, width = reach.step
    if slices > 1:  # with one volume, rows are slices
        depth = measured_stride(slices, output.shape[0], depth)
    if output.dim() >= 4:
        height = measured_stride(size[0], output.shape[2], height)
        width = measured_stride(size[1], output.shape[3], width)
    return (depth, height, width)


def measured_stride(size: int, extent: int, step: int) -> int:
    """Voxels per position of a map with `extent` positions for `size` voxels, where rules stepped by `step`.

    Padding rounds the extent, so only a difference near a factor of two counts, and only on maps of 4
    positions or more.
    """
    ratio = size / extent / step
    if extent < 4 or 1 / 1.75 < ratio < 1.75:
        return step
    near = round(step * 2.0 ** round(math.log2(ratio)))
    return near if near and -(-size // near) == extent else max(1, round(size / extent))


def _widen(survey: _Survey, rule: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    assert isinstance(rule, Rule)
    survey.passed(rule, inputs[0], output)
    return output
