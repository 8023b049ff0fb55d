"""Memory that prediction needs, and a limit on it."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medi3d.axes import Triple
from medi3d.datasets.images.files import VolumeHeader
from medi3d.datasets.images.resampling import SLAB_BYTES
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.engine.inference import SlidingWindow
from medi3d.engine.precision import evaluating
from medi3d.errors import Medi3dError
from medi3d.prediction.predictor import (
    Predictor,
)

WORKSPACE = 1.5
"""Ratio of a forward pass's memory to that of its tensors: libraries reorder and pad them."""


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensors created inside; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                storage = leaf.untyped_storage()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _freed(self, size: int) -> None:
        self.live -= size


@evaluating()
def forward_bytes(network: Callable[[Tensor], Tensor], image: Tensor) -> int:
    """Bytes that `network` takes beyond its weights, measured on an image `(B, C, D, H, W)`."""
    with _LiveTensors() as tensors:  # includes the copies of the weights that stay while a scan is predicted
        network(image)
    return int(tensors.peak * WORKSPACE) + image.nbytes


def resident_bytes() -> int:
    """Main memory that this process holds."""
    return psutil.Process().memory_info().rss


class MemoryBudget:
    """Bytes shared by all cases in progress; a case waits until its part is free.

    Args:
        limit: bytes in all; None: no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit, self._free = limit, limit or 0
        self._changed = threading.Condition()

    def take(self, need: int, name: str) -> None:
        """Wait for `need` bytes.

        Raises:
            Medi3dError: they exceed the limit.
        """
        if self._limit is None:
            return
        if need > self._limit:
            raise Medi3dError(
                f"{name}: needs about {need / 1e9:.2f} GB where --memory leaves {self._limit / 1e9:.2f} GB; "
                "allow more, or set a smaller prediction.window in the run's config"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._free >= need)
            self._free -= need

    def give_back(self, size: int) -> None:
        """Free what `take` gave."""
        if self._limit is not None:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def reading_bytes(header: VolumeHeader, settings: VolumeSettings) -> int:
    """Upper bound of the bytes for reading a scan, and later for its mask and confidence.

    It counts the arrays that are alive at once: as stored, oriented and blurred as float32, resampled,
    normalised.
    """
    native = float(np.prod(header.size, dtype=float))
    ours = native * _voxel_ratio(header, settings)
    return int(native * (3 * header.value_bytes + 12) + ours * 4 * (settings.channels + 4))


def band_bytes(header: VolumeHeader, predictor: Predictor) -> int:
    """Bytes for summing windows of all classes, and for the slabs resampled to the scan's grid."""
    settings, native = predictor.volumes, float(np.prod(header.size, dtype=float))
    ratio = _voxel_ratio(header, settings)
    classes = len(settings.label_names) + 1
    held = 5.0  # the sums, the finished slab, its probabilities, and what resampling back holds
    if isinstance(predictor.inferer, SlidingWindow):
        held = min(held, held * predictor.inferer.size[0] / _depth(header, settings))
    slice_bytes = 4 * classes * native / min(header.size)
    slabs = 6 * max(SLAB_BYTES, slice_bytes) * max(1.0, ratio)  # weighted neighbours; compared probabilities
    return int(native * ratio * classes * 4 * held + slabs)


def _voxel_ratio(header: VolumeHeader, settings: VolumeSettings) -> float:
    """Voxels on the network's grid per voxel of the file."""
    if settings.spacing is None:
        return 1.0
    return float(np.prod(header.spacing) / np.prod(settings.spacing))


def _depth(header: VolumeHeader, settings: VolumeSettings) -> float:
    """Lower bound of the slices on the network's grid: the header does not say which axis is depth."""
    sides = np.array(header.size, dtype=float)
    if settings.spacing is not None:
        sides *= np.array(header.spacing) / max(settings.spacing)
    return max(1.0, float(sides.min()))


def batch_of(predictor: Predictor) -> tuple[int, ...]:
    """Shape of one forward pass's input."""
    inferer, settings = predictor.inferer, predictor.volumes
    if isinstance(inferer, SlidingWindow):
        return (inferer.at_once, settings.channels, *inferer.size)
    patch: Triple = (settings.patch[0], settings.patch[1], settings.patch[2])
    return (1, settings.channels, *patch)
