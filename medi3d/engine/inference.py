"""Predictions for images of any size: one pass, or sliding windows a few slices at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor, nn
from torch.nn.functional import pad

from medi3d.axes import DEPTH, HEIGHT, WIDTH, Triple
from medi3d.engine.precision import Precision, evaluating

T = TypeVar("T")

AXES = {"depth": DEPTH, "height": HEIGHT, "width": WIDTH}

VOXELS_AT_ONCE, WINDOWS_AT_ONCE = 3 * 64**3, 3
"""Voxels per forward pass of windows: larger passes take more memory and, on a CPU, no less time."""

Network = Callable[[Tensor], Tensor]

Inferer = Callable[[Tensor, Network], Tensor]
"""(image `(B, C, D, H, W)`, network) -> logits in float32."""


def single_forward(image: Tensor, network: Network) -> Tensor:
    """The network on the whole image: `(B, C, D, H, W)` -> logits in float32."""
    return network(image).float()


@dataclass(frozen=True)
class SlidingWindow:
    """Logits `(B, classes, D, H, W)` of a volume of any size.

    A volume that fits into the window is predicted in one pass. A larger one is covered by overlapping
    windows, whose logits are averaged with Gaussian weights, as in nnU-Net (Isensee et al. 2021,
    doi:10.1038/s41592-020-01008-z); windows and weights are MONAI's. Where it is thinner than the training
    patches, its border voxels are repeated as in training: norms with statistics of the volume would
    otherwise see different ones.

    Args:
        size: window in voxels, (D, H, W).
        overlap: share of a window that its neighbour covers too, 0 to 1.
        windows_at_once: most windows in one forward pass; None: 3, fewer where they are large.
        patch: size of the training's patches in voxels; None: the window's.
    """

    size: Triple
    overlap: float = 0.5
    windows_at_once: int | None = None
    patch: Triple | None = None

    @property
    def at_once(self) -> int:
        """The most windows in one forward pass."""
        return self.windows_at_once or min(WINDOWS_AT_ONCE, max(1, VOXELS_AT_ONCE // math.prod(self.size)))

    def __call__(self, image: Tensor, network: Network) -> Tensor:
        """Image `(B, C, D, H, W)` -> logits `(B, classes, D, H, W)` in float32."""
        return torch.stack([torch.cat(list(self.slabs(one, network)), dim=1) for one in image])

    def slabs(self, image: Tensor, network: Network) -> Iterator[Tensor]:
        """Logits `(classes, s, H, W)` of one image `(C, D, H, W)`, from first to last slices.

        Only as many slices as a window's depth are held for all classes.
        """
        shape = image.shape[1:]
        window = self._window(shape)
        missing = [max(w - extent, 0) for extent, w in zip(shape, window, strict=True)]
        before = [lack // 2 for lack in missing]
        if any(missing):
            sides = [side for lack, low in zip(missing, before, strict=True) for side in (lack - low, low)]
            image = pad(image[None], sides[::-1], mode="replicate")[0]
        inside = tuple(slice(low, low + extent) for low, extent in zip(before, shape, strict=True))
        if image.shape[1:] == window:
            yield single_forward(image[None], network)[0][(slice(None), *inside)]
            return
        for slab in self._bands(image, window, network):
            yield slab[(slice(None), *inside)]

    def _window(self, shape: Sequence[int]) -> Triple:
        """The window for a volume: no larger than needed where the volume is thin."""
        depth, height, width = (
            min(largest, max(extent, least))
            for largest, extent, least in zip(self.size, shape, self.patch or self.size, strict=True)
        )
        return (depth, height, width)

    def _bands(self, image: Tensor, window: Triple, network: Network) -> Iterator[Tensor]:
        """Slices are final, and yielded, when no further window reaches them."""
        shape = image.shape[1:]
        places = dense_patch_slices(shape, window, self._steps(shape, window))
        rows = [(z.start, [(y, x) for _, y, x in row]) for z, row in groupby(places, lambda place: place[0])]
        ends = [start for start, _ in rows[1:]] + [shape[0]]
        sums = weights = importance = torch.empty(0)
        for (start, row), end in zip(rows, ends, strict=True):
            for part in _even_parts(row, self.at_once):
                depth = slice(start, start + window[0])
                logits = single_forward(torch.stack([image[:, depth, y, x] for y, x in part]), network)
                if not len(importance):
                    importance = _importance(window, logits.device)
                    sums = logits.new_zeros(logits.shape[1], window[0], *shape[1:])
                    weights = logits.new_zeros(sums.shape[1:])
                for one, (y, x) in zip(logits, part, strict=True):
                    sums[..., y, x] += one * importance
                    weights[..., y, x] += importance
            done = end - start
            yield sums[:, :done] / weights[:done]
            sums, weights = _moved_on(sums, done), _moved_on(weights, done)

    def _steps(self, shape: Sequence[int], window: Triple) -> Triple:
        depth, height, width = (
            size if size == extent else max(1, int(size * (1 - self.overlap)))
            for size, extent in zip(window, shape, strict=True)
        )
        return (depth, height, width)


def _even_parts(row: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """Parts of at most `most`, as equal as possible: one small window alone takes torch 3 times as long."""
    count = math.ceil(len(row) / most)
    for part in range(count):
        yield row[len(row) * part // count : len(row) * (part + 1) // count]


def _importance(window: Triple, device: torch.device) -> Tensor:
    return compute_importance_map(window, "gaussian", sigma_scale=0.125, device=device)


def _moved_on(band: Tensor, slices: int) -> Tensor:
    """The band (..., D, H, W) moved on by `slices`: those behind are dropped, zeros are appended."""
    kept = band.shape[-3] - slices
    if kept <= 0:
        return band.zero_()
    band[..., :kept, :, :] = band[..., slices:, :, :].clone()
    band[..., kept:, :, :] = 0
    return band


def mirrored(network: Network, axes: Sequence[str], swaps: Sequence[tuple[int, int]] = ()) -> Network:
    """`network` with its logits averaged over all mirrorings of the axes "depth", "height" or "width".

    As in nnU-Net, each window is mirrored. `swaps` are pairs of left and right classes, which change
    places: mirroring along "width" is wrong for an organ with a side that is not among them.
    """
    flips: list[list[int]] = [[]]
    for axis in axes:
        flips += [[*flip, AXES[axis]] for flip in flips]

    def averaged(windows: Tensor) -> Tensor:
        total = network(windows).float()
        for flip in flips[1:]:
            logits = network(windows.flip(flip)).float().flip(flip)
            total = total + (logits[:, _swapped(logits.shape[1], swaps)] if WIDTH in flip else logits)
        return total / len(flips)

    return averaged if len(flips) > 1 else network


def _swapped(classes: int, swaps: Sequence[tuple[int, int]]) -> list[int]:
    order = list(range(classes))
    for one, other in swaps:
        order[one], order[other] = other, one
    return order


def placed(network: nn.Module, precision: Precision) -> Network:
    """`network` for images on the CPU: it evaluates in the given precision, and logits stay on its device."""
    network.eval()

    def run(windows: Tensor) -> Tensor:
        with precision.autocast():
            return network(precision.place(windows))

    return run


@evaluating()
def predict(image: Tensor, network: nn.Module, inferer: Inferer, precision: Precision) -> Tensor:
    """Logits `(classes, ...)`, on the CPU, of one image `(C, D, H, W)`."""
    return inferer(image[None], placed(network, precision))[0].float().cpu()


def slabs_of(image: Tensor, network: Network, inferer: Inferer) -> Iterator[Tensor]:
    """Logits `(classes, s, H, W)` of one image `(C, D, H, W)`, slab by slab, on the network's device."""
    if isinstance(inferer, SlidingWindow):
        yield from inferer.slabs(image, network)
    else:
        yield inferer(image[None], network)[0]


@evaluating()
def predict_labels(image: Tensor, network: Network, inferer: Inferer) -> np.ndarray:
    """Label map `(D, H, W)` of uint8: for one volume `(C, D, H, W)`, the class with the highest logit."""
    slabs = slabs_of(image, network, inferer)
    return torch.cat([slab.max(dim=0).indices.to(torch.uint8).cpu() for slab in slabs]).numpy()
