"""Calls of functions that change the resolution (`F.max_pool2d`, `F.interpolate`, ...), spread along depth.

A network that pools in its `forward` has no layer that a rule could replace. The dry run notes which module
makes which calls (`tracing.py`). Each call that steps or enlarges in-plane gets its own rule, which does
the half along depth after the function's in-plane half. Calls inside layers with a rule are left to that
rule.
"""

from collections import Counter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medi3d.axes import to_pair
from medi3d.inflation.fold import Fold, merge_depth, split_depth
from medi3d.inflation.plan import DepthLayer, Kind, LayerGeometry
from medi3d.inflation.rules.adopted import mean_of_slices
from medi3d.inflation.rules.base import Geometry, Rule, adopt
from medi3d.inflation.rules.enlarging import EnlargingRule
from medi3d.inflation.rules.pooling import AvgPoolRule, MaxPoolRule

STEPPING: dict[str, Kind] = {
    "max_pool2d": "max_pool",
    "max_pool2d_with_indices": "max_pool",
    "avg_pool2d": "avg_pool",
    "lp_pool2d": "avg_pool",
    "conv2d": "resample",
    "interpolate": "resample",
    "pixel_unshuffle": "resample",
}
"""Functions that may step, with the kind of layer that the plan treats them as."""

ENLARGING = ("interpolate", "pixel_shuffle", "conv_transpose2d", "max_unpool2d")
"""Functions that may enlarge."""

WATCHED = frozenset({*STEPPING, *ENLARGING})


Found = tuple[Kind, tuple[int, int], tuple[int, int], dict[str, Any]]


def read_call(
    function: str, x: Tensor, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found | None:
    """Kind, kernel, stride and options of a call that steps or enlarges; None where it does neither.

    A pool over the whole map does neither, nor does an interpolation to nearly the same size.
    """
    names = _ARGUMENTS.get(function, ())
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    ratio = out.shape[-2] / x.shape[-2]
    factor = max(1, round(max(ratio, 1 / ratio)))
    if function in ENLARGING and ratio >= _CHANGES:
        return "upsample", (1, 1), (factor, factor), options
    if function == "pixel_unshuffle" or (function == "interpolate" and ratio <= 1 / _CHANGES):
        return "resample", (factor, factor), (factor, factor), options
    if function == "conv2d":
        stride = to_pair(options.get("stride", 1))
        return ("resample", stride, stride, options) if max(stride) > 1 else None
    if STEPPING.get(function) not in ("max_pool", "avg_pool"):
        return None
    kernel = to_pair(options["kernel_size"])
    stride = to_pair(options.get("stride") or kernel)
    whole = all(k >= n > 1 for k, n in zip(kernel, x.shape[-2:], strict=True))
    return None if whole else (STEPPING[function], kernel, stride, options)


_CHANGES = 1.5
"""Smallest ratio of sizes that counts as a change of resolution."""

_ARGUMENTS = {
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation"),
    "max_pool2d_with_indices": ("input", "kernel_size", "stride", "padding", "dilation"),
    "avg_pool2d": ("input", "kernel_size", "stride", "padding"),
    "lp_pool2d": ("input", "norm_type", "kernel_size", "stride"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation"),
    "interpolate": ("input", "size", "scale_factor", "mode", "align_corners"),
}
"""Names of the positional arguments."""


class Call(nn.Module):
    """Stands in for the layer of a traced call, with the attributes that a rule reads."""

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int], options: dict[str, Any]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.scale_factor = kernel, stride, stride
        self.dilation, self.padding = options.get("dilation", 1), options.get("padding", 0)
        self.mode = str(options.get("mode", "nearest"))
        self.align_corners = bool(options.get("align_corners"))


class StepCallRule(Rule):
    """A strided convolution or an unshuffle as a function, then the mean of `stride` slices."""

    kind: ClassVar[Kind] = "resample"

    def after(self, out: Any, x: Tensor) -> Any:
        """Apply the half along depth to the function's output."""
        return mean_of_slices(out, self)


class MaxPoolCallRule(MaxPoolRule):
    """A max-pool as a function."""

    def after(self, out: Any, x: Tensor) -> Any:
        """Apply the half along depth to the function's output."""
        return self.along_depth(out)


class AvgPoolCallRule(AvgPoolRule):
    """An average pool as a function."""

    def after(self, out: Any, x: Tensor) -> Any:
        """Apply the half along depth to the function's output."""
        return self.along_depth(out)


class EnlargeCallRule(EnlargingRule):
    """An enlargement as a function."""

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """The stride is the enlargement factor."""
        return (1, 1), to_pair(layer.stride), (1, 1)  # type: ignore[arg-type]

    def __init__(self, layer: Call, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__(layer, depth, fold, profile)
        self.mode, self.align_corners = layer.mode, layer.align_corners

    def after(self, out: Any, x: Tensor) -> Any:
        """Apply the half along depth to the function's output."""
        return self.along_depth(out, x.shape[-2])


class ReduceCallRule(EnlargeCallRule):
    """An interpolation to a smaller size as a function, surveyed like an enlargement."""

    kind: ClassVar[Kind] = "resample"


_RULES: dict[Kind, type[Rule]] = {
    "upsample": EnlargeCallRule,
    "max_pool": MaxPoolCallRule,
    "avg_pool": AvgPoolCallRule,
    "resample": StepCallRule,
}


def call_rule(
    function: str,
    geometry: LayerGeometry,
    options: dict[str, Any],
    depth: DepthLayer,
    fold: Fold,
    profile: str,
) -> Rule:
    """The rule for a traced call."""
    rule = (
        ReduceCallRule if function == "interpolate" and geometry.kind == "resample" else _RULES[geometry.kind]
    )
    return rule(Call(geometry.kernel, geometry.stride, options), depth, fold, profile)


class Caller:
    """The calls with a rule in one run of a module's code: by function and order of calls."""

    def __init__(self, calls: dict[tuple[str, int], Rule]) -> None:
        self.calls = calls
        self.seen: Counter[str] = Counter()

    def rule(self, function: str) -> Any:
        """The rule of the next call of that function; None if the call is left alone."""
        number = self.seen[function]
        self.seen[function] += 1
        return self.calls.get((function, number))


class CallingModule(nn.Module):
    """A module whose own function calls are spread along depth, without those of its submodules."""

    own_calls: tuple[Fold, dict[tuple[str, int], Rule]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like the wrapped module."""
        fold, calls = self.own_calls
        if not calls:
            with fold.quiet():
                return super().forward(*args, **kwargs)
        caller = Caller(calls)
        with fold.calling(caller), FunctionalCalls(fold, caller):
            return super().forward(*args, **kwargs)


def let_call(module: nn.Module, fold: Fold, calls: dict[tuple[str, int], Rule]) -> None:
    """Spread a module's own calls along depth, separately from those of the modules around it; in place."""
    adopt(module, CallingModule)
    module.own_calls = (fold, calls)  # type: ignore[assignment]


class FunctionalCalls(TorchFunctionMode):
    """While active, function calls by one module's code are spread along depth where they have a rule."""

    def __init__(self, fold: Fold, caller: Caller) -> None:
        super().__init__()
        self.fold, self.caller = fold, caller

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _NAMES.get(func, "")
        if not name or self.fold.call.caller is not self.caller:
            return func(*args, **kwargs)
        if name == "meeting":
            return func(*(self._met(*args) if len(args) == 2 else args), **kwargs)
        out, rule = func(*args, **kwargs), self.caller.rule(name)
        if rule is None:
            return out
        x = args[0] if args else kwargs["input"]
        with self.fold.quiet():
            spread = rule.after(out, x)
        survey = self.fold.call.survey
        if survey is not None:
            survey.passed(rule, x, spread)
        return spread

    def _met(self, one: Any, other: Any) -> tuple[Any, Any]:
        """Match two operands: repeat a coarser map's gate `(B·D', C, 1, 1)` for the slices of a finer one."""
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.dim() == other.dim() == 4:
            rows, others = one.shape[0], other.shape[0]
            if rows > others and other.shape[2:] == (1, 1):
                return one, self._repeated(other, rows)
            if rows < others and one.shape[2:] == (1, 1):
                return self._repeated(one, others), other
        return one, other

    def _repeated(self, gate: Tensor, rows: int) -> Tensor:
        volume = split_depth(gate, self.fold.batch)
        slices = rows // self.fold.batch
        source = torch.arange(slices, device=gate.device) * volume.shape[2] // slices
        repeated = merge_depth(volume.index_select(2, source), self.fold.batch)
        if hasattr(gate, "reach"):
            repeated.reach = gate.reach  # type: ignore[attr-defined]
        return repeated


_MEETING = ("mul", "__mul__", "__rmul__", "add", "__add__", "__radd__")
_HOMES: tuple[Any, ...] = (F, torch, torch._C._nn)
_NAMES: dict[Any, str] = {
    **{getattr(home, name): name for name in WATCHED for home in _HOMES if hasattr(home, name)},
    **{getattr(Tensor, name): "meeting" for name in _MEETING},
    torch.mul: "meeting",
    torch.add: "meeting",
}
"""Keyed by function, not by name: lookups of function names do not compile."""
