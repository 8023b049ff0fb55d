"""Folded execution: the 2D network runs on slices, a few layers unfold depth for their 3D work.

    (B, C, D, H, W)  ─fold─►  (B·D, C, H, W)  ─unmodified 2D code─►  (B·D', C', H', W')  ─unfold─►

Every line of the 2D network that is not a convolution, pool or resampling acts on each slice
alone, and is correct unchanged. Where depth matters, a layer only needs to know B: then
D = N / B at any point, also after a stride along depth. In channels-last memory folding and
unfolding are views and cost nothing.

B belongs to one call of the network in one thread, so concurrent calls do not see each other.
A layer that runs outside of a call has no B and raises `ShapeError`. This happens if anything other than
`medi3d.checkpoint_activations` reruns a part of the network in the backward pass.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medi3d.errors import ShapeError


class Call(NamedTuple):
    """What the layers of a network need to know about the volumes running through it."""

    batch: int
    height: int = 0
    """Height of the volumes, in voxels."""
    depth: int = 0
    """Depth of the volumes, in slices."""
    caller: Any = None
    """The module whose calls of functions are spread along depth at this point, see `FunctionalCalls`."""
    survey: Any = None
    """Records strides while the network is surveyed, see `reach`."""
    slices: int = 0
    """Slices of a volume where a layer's own tensors hide them, see `WindowRule` and `counting`."""
    items: int = 0
    """Items of a slice (heads, windows) that the layer now running finds in its batch dimension."""
    backward: int = -1
    """The backward pass in which the call was made; -1 in a forward pass."""


class _Running(threading.local):
    """The calls that are running in this thread, by the id of their `Fold`. Replaced, never changed."""

    def __init__(self) -> None:
        self.calls: Mapping[int, Call] = {}


_running = _Running()


def running_calls() -> Mapping[int, Call]:
    """The calls that are running in this thread, for `resumed`."""
    return _running.calls


@contextmanager
def resumed(calls: Mapping[int, Call]) -> Iterator[None]:
    """While active, these calls run in this thread, so that parts of them can be recomputed."""
    before, now = _running.calls, _backward_pass()
    _running.calls = {key: call._replace(backward=now) for key, call in calls.items()}
    try:
        yield
    finally:
        _running.calls = before


def _backward_pass() -> int:
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class Fold:
    """What all layers of one network share: its tubelet size and access to the running call."""

    def __init__(self) -> None:
        self.tubelet = 1
        """Slices that are grouped into channels at the entry, see `TubeletRule`."""

    @property
    def call(self) -> Call:
        """The call that is running in this thread.

        Raises:
            ShapeError: no call is running, or the backward pass reruns a part of one.
        """
        call = _running.calls.get(id(self))
        if call is None or (not torch.compiler.is_compiling() and call.backward != _backward_pass()):
            raise ShapeError(
                "a layer of an inflated network runs outside of the network's forward, where the number of "
                "volumes is unknown: run the whole network; to recompute activations in the backward pass "
                "use medi3d.checkpoint_activations(network), not a checkpoint inside of it"
            )
        return call

    @property
    def caller(self) -> Any:
        """`caller` of the running call; None if no call is running."""
        call = _running.calls.get(id(self))
        return None if call is None else call.caller

    @property
    def batch(self) -> int:
        """Number of volumes in the running call."""
        return self.call.batch

    @contextmanager
    def running(self, call: Call) -> Iterator[None]:
        """While active, the network's layers run in that call in this thread."""
        before = _running.calls
        _running.calls = {**before, id(self): call}
        try:
            yield
        finally:
            _running.calls = before

    @contextmanager
    def folded(self, volume: Tensor) -> Iterator[Tensor]:
        """While active, `volume` `(B, C, D, H, W)` runs through the network; yields it folded."""
        slices = self.fold(volume)
        batch, _, depth, height, _ = volume.shape
        call = Call(batch, height, depth, backward=_backward_pass())
        with self.running(call):
            yield slices

    def calling(self, caller: Any) -> AbstractContextManager[None]:
        """While active, the code of `caller` runs: its function calls are spread along depth."""
        return self.running(self.call._replace(caller=caller))

    def quiet(self) -> AbstractContextManager[None]:
        """While active, function calls are left alone; for a rule that runs its 2D layer."""
        return self.calling(None)

    def surveyed(self, survey: Any) -> AbstractContextManager[None]:
        """While active, `survey` records strides through the network, see `reach`."""
        return self.running(self.call._replace(survey=survey))

    @contextmanager
    def counting(self, slices: int) -> Iterator[None]:
        """While active, layers whose tensors hide the number of slices find it in the call."""
        with self.running(self.call._replace(slices=slices)):
            yield

    def fold(self, volume: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> `(B·D, C, H, W)`, with tubelets `(B·D/r, C·r, H, W)`.

        Raises:
            ShapeError: `volume` is not 5-D or has an empty axis.
        """
        if volume.dim() != 5 or 0 in volume.shape:
            raise ShapeError(
                f"an inflated network takes (B, C, D, H, W) with no empty axis, not {tuple(volume.shape)}"
            )
        if self.tubelet == 1:
            return volume.transpose(1, 2).flatten(0, 1)
        volume = pad_depth(volume, 0, -volume.shape[2] % self.tubelet, "replicate")
        grouped = volume.unflatten(2, (-1, self.tubelet))  # (B, C, D/r, r, H, W)
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def ungroup(self, grouped: Tensor) -> Tensor:
        """Tubelets back into slices: `(B·D/r, C·r, H, W)` -> `(B·D, C, H, W)`."""
        return grouped.unflatten(1, (-1, self.tubelet)).transpose(1, 2).flatten(0, 1)

    def unfold(self, output: Any) -> Any:
        """Bring depth back into every tensor of a network's output, to dimension 2.

        `(B·D, C, H, W)` -> `(B, C, D, H, W)`, `(B·D, C)` -> `(B, C, D)`.

        Raises:
            ShapeError: the output is not made of tensors, or mixes the batch.
        """
        if output is None:
            return None
        if isinstance(output, Tensor):
            batch = self.batch
            if output.dim() == 0 or output.shape[0] % batch:
                raise ShapeError(
                    f"the 2D network returned {tuple(output.shape)} for a batch of {batch} volumes: "
                    "it mixes the batch, so slices cannot be separated"
                )
            return output.unflatten(0, (batch, -1)).movedim(1, 2)
        if isinstance(output, dict):
            return {key: self.unfold(value) for key, value in output.items()}
        if isinstance(output, (list, tuple)):
            return [self.unfold(value) for value in output]
        raise ShapeError(
            f"the 2D network returned {type(output).__name__}; tensors, lists and dicts can be unfolded"
        )


def split_depth(x: Tensor, batch: int, multiplicity: int = 1) -> Tensor:
    """`(B·D·q, C, H, W)` -> `(B·q, C, D, H, W)`; q: items (heads, windows) of a slice in the batch."""
    # torch's function, not the tensor's method: inside a mode of functions it compiles.
    if multiplicity == 1:
        return torch.unflatten(x, 0, (batch, -1)).transpose(1, 2)
    return torch.unflatten(x, 0, (batch, -1, multiplicity)).transpose(1, 2).flatten(0, 1).transpose(1, 2)


def merge_depth(x: Tensor, batch: int, multiplicity: int = 1) -> Tensor:
    """Undo `split_depth`."""
    x = x.transpose(1, 2)
    if multiplicity == 1:
        return x.flatten(0, 1)
    return torch.unflatten(x, 0, (batch, multiplicity)).transpose(1, 2).flatten(0, 2)


def pad_depth(x: Tensor, before: int, after: int, mode: str) -> Tensor:
    """Add slices at both ends of `(B, C, D, H, W)`: copies of the end slice (`replicate`), or `zeros`.

    A negative number drops slices. Slices are joined one by one, which keeps channels-last memory.
    """
    if before < 0 or after < 0:
        x = x[:, :, max(-before, 0) : x.shape[2] - max(-after, 0)]
    first, last = x[:, :, :1], x[:, :, -1:]
    if mode == "zeros":
        first = last = torch.zeros_like(first)
    slices = [first] * before + [x] + [last] * after
    return torch.cat(slices, dim=2) if len(slices) > 1 else x
