"""How much memory a forward pass takes, and a budget that several cases at once keep to."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import psutil
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medi3d.engine.precision import evaluating
from medi3d.errors import Medi3dError

WORKSPACE = 1.5
"""Memory of a forward pass over that of its tensors: libraries reorder and pad them."""


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and not yet freed; `peak` is the most at once."""

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
    """Bytes that `network` takes beyond its weights, by trying it on an image `(B, C, D, H, W)`."""
    with _LiveTensors() as tensors:  # copies of the weights included, which stay while a scan is predicted
        network(image)
    return int(tensors.peak * WORKSPACE) + image.nbytes


def resident_bytes() -> int:
    """Main memory that this process holds."""
    return psutil.Process().memory_info().rss


class Budget:
    """So many bytes for all cases that are under way; a case waits until its part is free.

    Args:
        limit: bytes in all; None: no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit, self._free = limit, limit or 0
        self._changed = threading.Condition()

    def take(self, need: int, name: str) -> None:
        """Wait for `need` bytes.

        Raises:
            Medi3dError: they are more than all.
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
