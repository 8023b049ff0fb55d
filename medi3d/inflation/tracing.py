"""Run a 2D network once and record what each of its layers does in-plane."""

import copy
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from medi3d.axes import to_pair
from medi3d.errors import SourceError, first_line
from medi3d.inflation.plan import LayerGeometry
from medi3d.inflation.rules import WATCHED, find_rule, read_call

IMAGE_SIZES = (64, 96, 128, 192, 224, 256, 288, 384, 448, 512)
"""Image sizes to try, smallest first: some networks take only one size."""


BATCH = 2
"""Images of a dry run."""


@dataclass(frozen=True)
class SeenCall:
    """A call of a function that steps or enlarges, made by the code of the module at `module`."""

    geometry: LayerGeometry
    module: str
    function: str
    number: int
    """Number of earlier calls of that function in the same run of the module."""
    multiplicity: int
    options: dict[str, Any]


@dataclass
class Trace:
    """The record of a dry run. Paths are those of `named_modules`."""

    size: tuple[int, int]
    channels: int
    layers: dict[str, LayerGeometry] = field(default_factory=dict)
    """Layers that have a rule, in the order of their first run."""
    multiplicity: dict[str, int] = field(default_factory=dict)
    """Items of each slice (heads, windows) that a layer finds in its batch dimension."""
    counters: dict[str, str] = field(default_factory=dict)
    """For a layer with several items, the innermost module around it with one item per slice."""
    stems: set[str] = field(default_factory=set)
    """Convolutions that read the network's input itself."""
    calls: dict[str, SeenCall] = field(default_factory=dict)
    """Calls of functions that step or enlarge, by the path of the module and the function's name."""
    callers: set[str] = field(default_factory=set)
    """Modules that call these functions, including calls that neither step nor enlarge."""
    image_changed: bool = False
    """Whether no convolution reads the input itself, because it is first normalised or regrouped."""
    outputs: Any = None
    """The network's outputs for two images."""


def own_sizes(net2d: nn.Module) -> list[int]:
    """Sizes of square images, in pixels, that a network was made for, as its modules or timm report them."""
    found: list[int] = []
    for module in net2d.modules():
        built_for = getattr(module, "img_size", None)
        published = getattr(module, "pretrained_cfg", None)
        published = published.get("input_size") if isinstance(published, dict) else None
        for size in (built_for, published and published[1:]):
            sides = {size} if isinstance(size, int) else set(size or ()) if isinstance(size, tuple) else set()
            found += [side for side in sides if isinstance(side, int) and len(sides) == 1]
    return list(dict.fromkeys(found))


def trace(net2d: nn.Module, size: int | tuple[int, int] | None = None) -> Trace:
    """Run a copy of `net2d` on two random images of the smallest size that it takes, or of that size.

    Raises:
        SourceError: it takes no image, or no layer of it can be inflated.
    """
    net2d = copy_of(net2d).eval()
    first = input_channels(net2d)
    sizes = (size,) if size is not None else tuple(dict.fromkeys((*IMAGE_SIZES, *own_sizes(net2d))))
    failure: Exception | None = None
    for channels in dict.fromkeys((first, 3)):  # some regroup RGB before their first convolution
        for side in sizes:
            try:
                return _run(net2d, channels, to_pair(side))
            except Exception as error:  # any network may refuse a size in its own way
                failure = failure or error
    reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    if size is not None:
        height, width = to_pair(size)
        raise SourceError(
            f"{type(net2d).__name__} takes no ({BATCH}, {first}, {height}, {width}) image: {reason}"
        )
    raise SourceError(
        f"{type(net2d).__name__} takes no ({BATCH}, {first}, S, S) image for S in "
        f"{', '.join(map(str, sizes))}: {reason}; if it takes another size, give size=(height, width)"
    )


def copy_of(net2d: nn.Module) -> nn.Module:
    """A copy to work on: the given network stays as it is.

    Raises:
        SourceError: it has no weights yet, or cannot be copied.
    """
    if any(is_lazy(tensor) for tensor in (*net2d.parameters(), *net2d.buffers())):
        raise SourceError(
            f"{type(net2d).__name__} has lazy layers without weights: run it on an image once first"
        )
    try:
        return copy.deepcopy(net2d)
    except Exception as error:  # the network's own code may raise anything
        raise SourceError(
            f"{type(net2d).__name__} cannot be copied: {first_line(error)} (weight or spectral norm by "
            "hooks: bake it in first, with torch.nn.utils.remove_weight_norm or remove_spectral_norm)"
        ) from error


def within(path: str, block: str) -> bool:
    """Whether the module at `path` is that at `block`, or inside it."""
    return path == block or path.startswith(f"{block}.") or not block


def input_channels(net2d: nn.Module) -> int:
    """Channels of the images, by the first convolution.

    Raises:
        SourceError: there is none.
    """
    for layer in net2d.modules():
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
    raise SourceError(f"{type(net2d).__name__} has no 2D convolution: there is nothing to inflate")


@torch.no_grad()
def _run(net2d: nn.Module, channels: int, size: tuple[int, int]) -> Trace:
    parameter = next(net2d.parameters())
    image = torch.randn(BATCH, channels, *size, dtype=parameter.dtype, device=parameter.device)
    recorder = _Recorder(net2d, image, Trace(size, channels))
    hooks = [
        hook
        for path, layer in net2d.named_modules()
        for hook in (
            layer.register_forward_pre_hook(partial(recorder.enter, path), with_kwargs=True),
            layer.register_forward_hook(partial(recorder.leave, path)),
        )
    ]
    seen = recorder.seen
    try:
        with recorder:
            output = net2d(image)
    finally:
        for hook in hooks:
            hook.remove()
    seen.outputs = output
    if not seen.stems:  # the input was changed before the first convolution
        seen.image_changed = True
        seen.stems = {path for path, g in list(seen.layers.items())[:1] if g.kind == "conv"}
    return seen


class _Recorder(TorchFunctionMode):
    """Records the layers that have a rule, and function calls outside of them, as they run."""

    def __init__(self, net2d: nn.Module, image: Tensor, seen: Trace) -> None:
        super().__init__()
        self.image, self.seen = image, seen
        self.rules = {path: find_rule(layer) for path, layer in net2d.named_modules()}
        self.counts: Counter[str] = Counter()
        self.inside: list[tuple[str, Counter[str]]] = []
        self.whole: dict[str, str] = {}
        """For each module that runs, the innermost module around it with whole slices."""

    def enter(self, path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a layer before it runs."""
        self.inside.append((path, Counter()))
        self._look(path, args)
        rule, seen = self.rules[path], self.seen
        if rule is None or path in seen.layers or not args:
            return
        x: Tensor = args[0]
        kernel, stride, dilation = rule.geometry_of(layer)
        seen.layers[path] = self._geometry(path, rule.kind, kernel, stride, dilation, x)
        seen.multiplicity[path] = max(1, x.shape[0] // BATCH)
        around = path.rpartition(".")[0]
        if seen.multiplicity[path] > 1 and around in self.whole:
            seen.counters[path] = self.whole[around]
        if rule.kind == "conv" and x.data_ptr() == self.image.data_ptr():
            seen.stems.add(path)

    def _look(self, path: str, args: tuple[Any, ...]) -> None:
        first, around = args[0] if args else None, path.rpartition(".")[0]
        if isinstance(first, Tensor) and first.dim() and first.shape[0] == BATCH and path:
            self.whole[path] = path
        elif around in self.whole:
            self.whole[path] = self.whole[around]

    def leave(self, path: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Record a layer's enlargement factor after it has run."""
        self.inside.pop()
        known = self.seen.layers.get(path)
        if known is not None and known.kind == "upsample" and known.stride == (1, 1):
            factor = tuple(
                max(1, round(a / b)) for a, b in zip(output.shape[2:], args[0].shape[2:], strict=True)
            )
            self.seen.layers[path] = replace(known, stride=factor)  # type: ignore[arg-type]

    def _geometry(
        self, path: str, kind: Any, kernel: Any, stride: Any, dilation: Any, x: Tensor
    ) -> LayerGeometry:
        height = self.image.shape[-2]
        scale = height / x.shape[-2] if x.shape[-2] > 1 else float(height)
        ordinal = self.counts[kind]
        self.counts[kind] += 1
        return LayerGeometry(path, kind, kernel, stride, dilation, scale, ordinal)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in WATCHED:
            self._record(name, out, args, kwargs)
        return out

    def _record(self, function: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module, made = self.inside[-1]
        number = made[function]
        made[function] += 1
        if any(rule is not None and within(module, path) for path, rule in self.rules.items()):
            return
        self.seen.callers.add(module)
        x: Tensor = args[0] if args else kwargs["input"]
        result = out[0] if isinstance(out, tuple) else out
        path = ".".join(filter(None, (module, function))) + (f"_{number}" if number else "")
        if path in self.seen.calls or x.dim() != 4 or x.shape[0] % BATCH:
            return
        found = read_call(function, x, result, args, kwargs)
        if found is not None:
            kind, kernel, stride, options = found
            geometry = self._geometry(path, kind, kernel, stride, (1, 1), x)
            self.seen.calls[path] = SeenCall(
                geometry, module, function, number, max(1, x.shape[0] // BATCH), options
            )
