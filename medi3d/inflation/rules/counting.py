"""Windows that a block puts into the batch dimension; each call counts them, as image sizes vary."""

from typing import Any

from torch import Tensor, nn

from medi3d.inflation.fold import Fold
from medi3d.inflation.rules.base import Rule, adopt


def count_items(network: nn.Module, counters: dict[str, str], fold: Fold) -> None:
    """Make rules that find several items of a slice in their batch count them, in place.

    Args:
        network: with its rules.
        counters: maps the path of such a rule to that of the innermost module around it with whole slices.
        fold: the network's fold.
    """
    for path, around in counters.items():
        rule, block = network.get_submodule(path), network.get_submodule(around)
        steps = any(isinstance(m, Rule) and m is not block and m.depth.stride > 1 for m in block.modules())
        if not isinstance(rule, Rule) or steps:  # its initial number of slices no longer holds
            continue
        adopt(rule, ItemsOfSlices)
        if not isinstance(block, SlicesCounted):
            block.counted_by = fold  # type: ignore[assignment]
            adopt(block, SlicesCounted)


class SlicesCounted(nn.Module):
    """A block that records the number of slices of a volume, because its inner tensors hide it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Like the wrapped block, on `(B·D, ...)`."""
        fold: Any = self.counted_by
        with fold.counting(x.shape[0] // fold.batch):
            return super().forward(x, *args, **kwargs)


class ItemsOfSlices(nn.Module):
    """A rule in such a block, which counts its items, because their number depends on the image size."""

    fold: Fold

    @property
    def multiplicity(self) -> int:
        """Items of each slice in the running call; while they are not counted, those of the dry run."""
        return self.fold.call.items or int(self.__dict__["multiplicity"])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Like the wrapped rule, on `(B·D·q, ...)`."""
        call = self.fold.call
        with self.fold.running(call._replace(items=x.shape[0] // (call.batch * call.slices))):
            return super().forward(x, *args, **kwargs)
