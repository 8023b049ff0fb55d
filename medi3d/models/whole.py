"""A whole 2D segmentation network as a segmenter of volumes: inflated unchanged, with a fresh head."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from medi3d.axes import DEPTH, check_volume
from medi3d.errors import ShapeError, SourceError, first_line
from medi3d.inflation.network import Inflated, inflate
from medi3d.inflation.source import baked
from medi3d.inflation.tracing import Trace, copy_of, trace
from medi3d.models.segmenter import pad_to

_OPTIONS = ("plan", "profile", "in_channels", "size", "allow_inexact")


class WholeSegmenter(nn.Module):
    """An inflated 2D segmentation network: `(B, C, D, H, W)` -> logits `(B, num_classes, D, H, W)`.

    Any depth. Height and width are padded at their far ends, by repetition, to a multiple of the network's
    largest stride, unless it takes only its own size.
    """

    def __init__(self, network: Inflated) -> None:
        super().__init__()
        self.network = network
        _, self.rows, self.columns = network.deepest

    def forward(self, volume: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> logits of the same size.

        Raises:
            ShapeError: the input is not 5-D, is empty, has another number of channels, or a size that the
                network does not take.
        """
        check_volume(volume.shape, self.network.in_channels)
        size = volume.shape[DEPTH:]
        depth, height, width = size
        padded = pad_to(volume, (depth, height + -height % self.rows, width + -width % self.columns))
        try:
            logits = main_output(self.network(padded))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ShapeError(
                f"this network takes no volume of {tuple(size)} voxels: {first_line(error)}"
            ) from error
        if logits.dim() != volume.dim() or any(
            a < b for a, b in zip(logits.shape[DEPTH:], size, strict=True)
        ):
            raise ShapeError(f"this network gives {tuple(logits.shape)} for a volume of {tuple(size)} voxels")
        return logits[:, :, :depth, :height, :width]


def main_output(output: Any) -> Any:
    """The map itself; `out` of torchvision's dicts, or the only map of a list."""
    if isinstance(output, dict):
        return output.get("out", next(iter(output.values()), None))
    return output[0] if isinstance(output, (list, tuple)) and len(output) == 1 else output


def is_whole(net2d: nn.Module, size: int | tuple[int, int] | None = None) -> bool:
    """Whether a 2D network's output is one map of its image's size: a segmentation network, not an encoder.

    Raises:
        SourceError: it does not take images.
    """
    seen = trace(baked(net2d), size)
    found = main_output(seen.outputs)
    return isinstance(found, Tensor) and found.dim() == 4 and tuple(found.shape[2:]) == seen.size


def create_whole(net2d: nn.Module, num_classes: int, **options: Any) -> WholeSegmenter:
    """Inflate a 2D segmentation network with a fresh head.

    Args:
        net2d: returns one map of its image's size; it is not changed. Its weights are used, except the
            head's.
        num_classes: channels of the logits.
        options: `plan`, `profile`, `in_channels` (1 if not given), `size`, `allow_inexact` of `inflate`.

    Raises:
        SourceError: an option that belongs to an encoder, or no head that can be replaced.
        InexactError, ShapeError: see `inflate`.
    """
    for name in options:
        if name not in _OPTIONS:
            raise SourceError(
                f"{type(net2d).__name__} is a segmentation network with its own decoder: leave out {name!r}"
            )
    if getattr(net2d, "deep_supervision", False):
        raise SourceError(
            f"{type(net2d).__name__} has deep supervision, whose heads work only in training: "
            "build it without"
        )
    plan = options.pop("plan", "isotropic")
    fresh = with_fresh_head(net2d, num_classes, options.get("size"))
    return WholeSegmenter(inflate(fresh, plan, **{"in_channels": 1, **options}))


@torch.no_grad()
def with_fresh_head(
    net2d: nn.Module, num_classes: int, size: int | tuple[int, int] | None = None
) -> nn.Module:
    """A copy whose last layers with parameters output `num_classes` channels.

    Raises:
        SourceError: a last layer is neither a convolution of all channels nor a norm of its output.
    """
    fresh = copy_of(baked(net2d))
    seen = trace(fresh, size)
    fresh.eval()
    channels = int(main_output(seen.outputs).shape[1])
    image = _image(fresh, seen)
    with _marking(fresh) as mark:
        last: frozenset[str] = getattr(main_output(fresh(mark(image))), "last", frozenset())
    for path in sorted(last):
        _replace(fresh, path, channels, num_classes)
    fresh.eval()(image)  # sets the channels of heads that follow a head
    fresh.train(net2d.training)
    for path, module in net2d.named_modules():
        fresh.get_submodule(path).training = module.training
    return fresh


def _image(net2d: nn.Module, seen: Trace) -> Tensor:
    kernel = next(net2d.parameters())
    return torch.zeros(2, seen.channels, *seen.size, dtype=kernel.dtype, device=kernel.device)


class _Marked(Tensor):
    """A tensor that knows the last layers with parameters before it."""

    last: frozenset[str]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        last: frozenset[str] = frozenset().union(
            *(getattr(v, "last", ()) for v in tree_flatten((args, kwargs))[0])
        )

        def carry(value: Any) -> Any:
            if isinstance(value, _Marked):
                value.last = last
            return value

        return tree_map(carry, result)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:  # type: ignore[override]
        """A plain tensor."""
        return self.detach().as_subclass(Tensor).clone()


@contextmanager
def _marking(net2d: nn.Module) -> Iterator[Any]:
    def mark(tensor: Tensor, last: frozenset[str] = frozenset()) -> Tensor:
        marked = tensor.as_subclass(_Marked)
        marked.last = last
        return marked

    def passed(path: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        follows = isinstance(layer, _FOLLOWERS) and args and hasattr(args[0], "last")
        return mark(output, (args[0].last if follows else frozenset()) | {path})

    hooks = [
        layer.register_forward_hook(partial(passed, path))
        for path, layer in net2d.named_modules()
        if isinstance(layer, _NORMS) or any(p.numel() > 1 for p in layer.parameters(recurse=False))
    ]
    try:
        yield mark
    finally:
        for hook in hooks:
            hook.remove()


_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)
_FOLLOWERS = (*_NORMS, nn.PReLU)
"""Layers with a number per channel, which may follow a head."""


def _replace(net2d: nn.Module, path: str, channels: int, num_classes: int) -> None:
    layer: Any = net2d.get_submodule(path)
    kind = type(layer).__name__
    common: dict[str, Any] = {
        "dtype": getattr(layer.weight, "dtype", None),
        "device": getattr(layer.weight, "device", None),
    }
    if (
        type(layer) in (nn.Conv2d, nn.ConvTranspose2d)
        and layer.groups == 1
        and layer.out_channels == channels
    ):
        lazy: Any = nn.LazyConv2d if isinstance(layer, nn.Conv2d) else nn.LazyConvTranspose2d
        shape = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        options = {name: getattr(layer, name) for name in shape}
        if isinstance(layer, nn.ConvTranspose2d):
            options["output_padding"] = layer.output_padding
        new = lazy(num_classes, bias=layer.bias is not None, **options, **common)
    elif isinstance(layer, _NORMS) and layer.num_features == channels:
        kept: Any = (layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        norm: Any = type(layer)
        new = norm(num_classes, *kept, **common)
    elif isinstance(layer, nn.PReLU):
        new = nn.PReLU(num_classes, **common)
    else:
        raise SourceError(
            f"{type(net2d).__name__} ends in {path!r} ({kind}), which cannot give {num_classes} classes: "
            f"it must end in a convolution with its {channels} channels"
        )
    parent, _, name = path.rpartition(".")
    setattr(net2d.get_submodule(parent), name, new)
