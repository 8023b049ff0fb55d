"""Run a 2D network once and write down what each of its layers did in-plane."""

import copy
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from medi3d.errors import SourceError, first_line
from medi3d.inflation.plan import LayerGeometry
from medi3d.inflation.rules import find_rule

IMAGE_SIZES = (64, 96, 128, 192, 224, 256, 288, 384, 448, 512)
"""Image sizes to try, smallest first: some networks take only their own."""


@dataclass
class Trace:
    """What a dry run saw. Paths are those of `named_modules`."""

    size: int
    channels: int
    layers: dict[str, LayerGeometry] = field(default_factory=dict)
    """Layers that have a rule, in the order in which they first ran."""
    multiplicity: dict[str, int] = field(default_factory=dict)
    """Items of each slice (heads, windows) that a layer finds in its batch dimension."""
    counters: dict[str, str] = field(default_factory=dict)
    """Of a layer with several such items the module around it that last saw one item a slice."""
    stems: set[str] = field(default_factory=set)
    """Convolutions that read the network's input itself."""


def own_sizes(net2d: nn.Module) -> list[int]:
    """Sizes of square images, in pixels, that a network was made for, as its modules or timm tell it."""
    found: list[int] = []
    for module in net2d.modules():
        built_for = getattr(module, "img_size", None)
        published = getattr(module, "pretrained_cfg", None)
        published = published.get("input_size") if isinstance(published, dict) else None
        for size in (built_for, published and published[1:]):
            sides = {size} if isinstance(size, int) else set(size or ()) if isinstance(size, tuple) else set()
            found += [side for side in sides if isinstance(side, int) and len(sides) == 1]
    return list(dict.fromkeys(found))


def trace(net2d: nn.Module, size: int | None = None) -> Trace:
    """Run a copy of `net2d` on two random images of `size` pixels, or of the smallest size that it takes.

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
                return _run(net2d, channels, side)
            except Exception as error:  # any network may refuse a size in its own way
                failure = failure or error
    reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    raise SourceError(
        f"{type(net2d).__name__} takes no (2, {first}, S, S) image for S in {', '.join(map(str, sizes))}: "
        f"{reason}"
    )


def copy_of(net2d: nn.Module) -> nn.Module:
    """A copy to work on: the given network stays as it is.

    Raises:
        SourceError: it has no weights yet, or cannot be copied.
    """
    if any(is_lazy(tensor) for tensor in (*net2d.parameters(), *net2d.buffers())):
        raise SourceError(
            f"{type(net2d).__name__} has lazy layers without weights: run it on an image once before"
        )
    try:
        return copy.deepcopy(net2d)
    except Exception as error:  # whatever its own parts raise
        raise SourceError(
            f"{type(net2d).__name__} cannot be copied: {first_line(error)} (weight and spectral norms of "
            "hooks: bake them in before, with torch.nn.utils.remove_weight_norm and remove_spectral_norm)"
        ) from error


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
def _run(net2d: nn.Module, channels: int, size: int) -> Trace:
    parameter = next(net2d.parameters())
    image = torch.randn(2, channels, size, size, dtype=parameter.dtype, device=parameter.device)
    seen = Trace(size, channels)
    counts: Counter[str] = Counter()

    def record(path: str, layer: nn.Module, x: Tensor) -> None:
        if path in seen.layers:
            return
        rule = find_rule(layer)
        assert rule is not None
        kernel, stride, dilation = rule.geometry_of(layer)
        scale = size / x.shape[-2] if x.shape[-2] > 1 else float(size)
        seen.layers[path] = LayerGeometry(path, rule.kind, kernel, stride, dilation, scale, counts[rule.kind])
        seen.multiplicity[path] = max(1, x.shape[0] // 2)
        if seen.multiplicity[path] > 1 and path.rpartition(".")[0] in whole:
            seen.counters[path] = whole[path.rpartition(".")[0]]
        counts[rule.kind] += 1
        if rule.kind == "conv" and x.data_ptr() == image.data_ptr():
            seen.stems.add(path)

    whole: dict[str, str] = {}  # of every module that runs, the innermost one around it with whole slices

    def look(path: str, args: tuple[object, ...]) -> None:
        first = args[0] if args else None
        around = path.rpartition(".")[0]
        if isinstance(first, Tensor) and first.dim() and first.shape[0] == image.shape[0] and path:
            whole[path] = path
        elif around in whole:
            whole[path] = whole[around]

    hooks = [
        module.register_forward_pre_hook(lambda m, args, path=path: look(path, args))
        for path, module in net2d.named_modules()
    ]
    hooks += [
        layer.register_forward_pre_hook(lambda m, args, path=path: record(path, m, args[0]))
        for path, layer in net2d.named_modules()
        if find_rule(layer) is not None
    ]
    try:
        net2d(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen.stems:  # the input was changed before the first convolution saw it
        seen.stems = {path for path, g in list(seen.layers.items())[:1] if g.kind == "conv"}
    return seen
