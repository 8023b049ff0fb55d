"""Networks as TorchScript: a trace, behind a check of the input's size that is part of the file.

A trace keeps numbers that were computed from the size of its example, such as a padding, as they were: at
another size it may fail inside, or answer wrongly. The check refuses every size that it was not proven at.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], list[Tensor]]


class _Checked(nn.Module):
    """The trace and what it takes; written so that TorchScript can compile it."""

    def __init__(
        self, network: nn.Module, shape: tuple[int, ...], step: tuple[int, ...], batch: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.channels, self.depth, self.height, self.width = shape[1:]
        self.step_d, self.step_h, self.step_w = step
        self.batch = 0 if batch else shape[0]

    def check(self, volume: Tensor) -> None:
        """Refuse what the trace was not proven for; a step of 0 allows its own size alone."""
        if volume.dim() != 5 or volume.shape[1] != self.channels:
            raise ValueError(f"this network takes (B, {self.channels}, D, H, W), not {volume.shape}")
        if self.batch > 0 and volume.shape[0] != self.batch:
            raise ValueError(f"this network takes {self.batch} volume at a time, not {volume.shape[0]}")
        right = self.fits(volume.shape[2], self.depth, self.step_d)
        right = right and self.fits(volume.shape[3], self.height, self.step_h)
        right = right and self.fits(volume.shape[4], self.width, self.step_w)
        if not right:
            raise ValueError(
                f"this network was exported for {self.depth}, {self.height}, {self.width} voxels and "
                f"multiples of {self.step_d}, {self.step_h}, {self.step_w} more, not {volume.shape[2]}, "
                f"{volume.shape[3]}, {volume.shape[4]}"
            )

    def fits(self, size: int, least: int, step: int) -> bool:
        """Whether a size is `least` plus a multiple of `step`."""
        return size == least or (step > 0 and size > least and (size - least) % step == 0)


class _CheckedMap(_Checked):
    def forward(self, volume: Tensor) -> Tensor:
        self.check(volume)
        return self.network(volume)


class _CheckedMaps(_Checked):
    def forward(self, volume: Tensor) -> list[Tensor]:
        self.check(volume)
        return self.network(volume)


def write_torchscript(
    network: nn.Module,
    path: Path,
    shape: tuple[int, ...],
    steps: Callable[[Run], tuple[int, ...] | None],
    *,
    batch: bool,
    extra: Mapping[str, str],
) -> Run:
    """Trace, check, save, and give back what runs the file.

    Args:
        network: returns a tensor or a list of them.
        path: of the file.
        shape: of the example, `(B, C, D, H, W)`.
        steps: from the bare trace to the steps by which each axis may grow; None: it may not.
        batch: leave the batch free.
        extra: further files in the archive.
    """
    trace = torch.jit.trace(network, torch.zeros(*shape), check_trace=False, strict=False)
    step = steps(lambda volume: _listed(trace(volume))) or (0, 0, 0)
    kind = _CheckedMap if isinstance(trace(torch.zeros(*shape)), Tensor) else _CheckedMaps
    module = torch.jit.script(kind(trace, shape, step, batch).eval())
    torch.jit.save(module, path, _extra_files=dict(extra))
    loaded = torch.jit.load(path)
    return lambda volume: _listed(loaded(volume))


def _listed(output: Tensor | list[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)
