"""Which image sizes a 2D network takes, and volumes brought to one of them.

Transformers come with position embeddings for one size, pyramids with branches that meet only where a size
divides. The sizes are found by running a copy of the network on torch's meta device, where tensors have
shapes and no contents: nothing is computed.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from medi3d.axes import DEPTH
from medi3d.errors import ShapeError
from medi3d.inflation.tracing import IMAGE_SIZES, input_channels, own_sizes

MULTIPLES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64, 128)
"""Candidate divisors of height and width; 7 and 14 are patches and windows of transformers."""

DEPTH_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)

_LEAST = (8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192)
"""Smallest sizes that are tried, in pixels."""


@dataclass(frozen=True)
class ImageSizes:
    """The sizes that a network takes: multiples of `multiple` from `least` up, or `only` × `only` pixels."""

    multiple: int = 1
    least: int = 1
    only: int | None = None
    depth_multiple: int = 1

    def fit(self, size: Sequence[int]) -> list[int]:
        """The smallest (depth, height, width) that the network takes and that holds `size`.

        Raises:
            ShapeError: height or width exceeds the network's only size.
        """
        depth, *in_plane = size
        if self.only is None:
            in_plane = [max(s, self.least) for s in in_plane]
            return [_up(depth, self.depth_multiple), *(_up(s, self.multiple) for s in in_plane)]
        if max(in_plane) > self.only:
            raise ShapeError(
                f"this network takes images up to {self.only}×{self.only}, for which it was built, not "
                f"{in_plane[0]}×{in_plane[1]}: build it with size={max(in_plane)}"
            )
        return [_up(depth, self.depth_multiple), self.only, self.only]

    def pad(self, volume: Tensor) -> Tensor:
        """`(B, C, D, H, W)` with its far ends repeated up to a size that the network takes."""
        size = volume.shape[DEPTH:]
        missing = [wanted - have for wanted, have in zip(self.fit(size), size, strict=True)]
        if not any(missing):
            return volume
        depth, height, width = missing
        return nn.functional.pad(volume, (0, width, 0, height, 0, depth), mode="replicate")


def dry_twin(network: nn.Module) -> nn.Module:
    """A copy on the meta device, in evaluation mode and without normaliser: it gives shapes at no cost."""
    tensors = [*network.parameters(), *network.buffers()]
    twin: Any = copy.deepcopy(network, {id(t): _without_content(t) for t in tensors}).eval()
    if getattr(twin, "normaliser", None) is not None:
        twin.in_channels, twin.normaliser = twin.normaliser.channels, None
    return twin


def _without_content(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def find_sizes(net2d: nn.Module, built_for: int | None = None) -> ImageSizes | None:
    """The image sizes that `net2d` takes; None: it takes none, or they are unknown.

    A size counts if the maps grow with it, because some networks scale every image to their own size. If
    such a network does not report that size, its sizes are unknown.

    Args:
        net2d: takes `(N, C, H, W)`.
        built_for: height and width of the images that it was built for, in pixels; None: as it reports.
    """
    own = own_sizes(net2d) if built_for is None else [built_for]
    for network in (dry_twin(net2d), copy.deepcopy(net2d).eval()):  # some cannot run on the meta device
        for side in dict.fromkeys([*own, *IMAGE_SIZES]):
            for channels in dict.fromkeys((input_channels(net2d), 3)):
                shapes = _shapes_of(network, channels)
                if shapes(side, side) is not None:
                    sizes = _sizes(shapes, side)
                    scales = sizes.only is not None and shapes(2 * side, 2 * side) is not None
                    return None if scales and side not in own else sizes
    return None


def proof_size(net2d: nn.Module, sizes: ImageSizes | None, size: int | None) -> int | None:
    """Height and width of the images on which a network is proven, in pixels; None: any that it takes.

    A network with position embeddings is proven at the size of the volumes, if that is known.
    """
    if sizes is None:
        return None
    if sizes.only is not None:
        return sizes.only
    if size is None or not any(hasattr(module, "img_size") for module in net2d.modules()):
        return None
    return sizes.fit((1, size, size))[1]


def takes(net2d: nn.Module, side: int) -> bool:
    """Whether a network on the meta device takes square images of `side` pixels."""
    return _shapes_of(dry_twin(net2d), input_channels(net2d))(side, side) is not None


def _sizes(shapes: "Shapes", known: int) -> ImageSizes:
    own = shapes(known, known)
    assert own is not None
    multiple = next((m for m in (*MULTIPLES, known) if _grows(own, shapes, known, m)), None)
    if multiple is None:
        return ImageSizes(only=known)
    smaller = [_up(size, multiple) for size in _LEAST if size < known]
    least = next((size for size in smaller if shapes(size, size) is not None), known)
    return ImageSizes(multiple, min(_up(least, multiple), _up(known, multiple)))


def find_depth_multiple(encoder: nn.Module, sizes: ImageSizes, known: int) -> int:
    """The divisor that the number of slices must have for branches to meet."""
    side = sizes.only or _up(known, sizes.multiple)

    def takes(slices: int) -> bool:
        return dry_run(encoder, (slices, side, side)) is not None

    return next((m for m in DEPTH_MULTIPLES if takes(3 * m) and takes(5 * m)), 1)


def dry_run(encoder: nn.Module, size: Sequence[int]) -> list[torch.Size] | None:
    """Shapes of an encoder's maps for one volume of (depth, height, width); None: it does not take it.

    Nothing is computed, unless the encoder cannot run on the meta device.
    """
    for twin in (dry_twin(encoder), encoder):
        declared: Any = twin
        parameter = next(twin.parameters())
        training = twin.training
        shape = (1, declared.in_channels, *size)
        shapes = _outputs(twin.eval(), torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
        twin.train(training)
        if shapes is not None:
            return shapes
    return None


Shapes = Callable[[int, int], list[torch.Size] | None]


def _shapes_of(network: nn.Module, channels: int) -> Shapes:
    """(height, width) -> shapes of the network's outputs for such an image, or None if it takes none."""
    parameter = next(network.parameters())

    def shapes(height: int, width: int) -> list[torch.Size] | None:
        image = torch.zeros(1, channels, height, width, dtype=parameter.dtype, device=parameter.device)
        return _outputs(network, image)

    return shapes


@torch.no_grad()
def _outputs(network: nn.Module, x: Tensor) -> list[torch.Size] | None:
    try:
        outputs = [o.shape for o in tree_leaves(network(x)) if isinstance(o, Tensor)]
    except Exception:  # any network may refuse a size in its own way
        return None
    return outputs if outputs and all(0 not in shape for shape in outputs) else None


def _grows(own: list[torch.Size], shapes: Shapes, known: int, multiple: int) -> bool:
    """Whether it takes odd multiples, of unequal height and width, with maps that grow in proportion.

    Without padding they grow by more, because the loss at the borders is constant.
    """
    odd = (3 * known // 2) // multiple | 1
    height, width = odd * multiple, (odd + 2) * multiple
    found = shapes(height, width)
    if found is None or len(found) != len(own):
        return False
    return all(
        after[axis] + 2 >= before[axis] * size / known
        for before, after in zip(own, found, strict=True)
        for axis, size in ((2, height), (3, width))
        if len(before) == 4
    )


def _up(size: int, multiple: int) -> int:
    return size + -size % multiple
