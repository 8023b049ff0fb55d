"""Key maps: published name -> our name, and the layout of the published numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor


def as_published(our_key: str, tensor: Tensor) -> Tensor:
    """A tensor unchanged: its layout is ours."""
    return tensor


@dataclass(frozen=True)
class KeyMap:
    """A table of names, and the layout of the published numbers.

    Our names that a network does not have are skipped silently: encoders end before the head.
    """

    table: Mapping[str, str | None]
    to_our_layout: Callable[[str, Tensor], Tensor] = as_published
    dropped: tuple[str, ...] = ()
    """Glob patterns of published names that are dropped on purpose: decoders, heads, prompts."""
    stem: str | None = None
    """Our name of the first kernel, which may be adapted to any number of input channels."""
    ones: tuple[str, ...] = ()
    """Glob patterns of published names that are dropped only if every number is 1: our
    norms have no scale, and a trained scale must not be lost."""

    @property
    def keeps_layout(self) -> bool:
        """Whether kernels are used unchanged, neither turned nor reordered."""
        return self.to_our_layout is as_published

    def drops(self, published: str) -> bool:
        """Whether a published name outside the table is dropped on purpose."""
        return any(fnmatchcase(published, pattern) for pattern in (*self.dropped, *self.ones))

    def must_be_one(self, published: str) -> bool:
        """Whether a tensor is dropped if it changes nothing, which the caller has to check."""
        return any(fnmatchcase(published, pattern) for pattern in self.ones)


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""Tensors of a batch norm."""


def norm(published: str, ours: str) -> dict[str, str | None]:
    """The table of one batch norm."""
    return {f"{published}.{tensor}": f"{ours}.{tensor}" for tensor in NORM}
