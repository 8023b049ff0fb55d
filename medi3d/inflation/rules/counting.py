"""Windows that a block puts into the batch dimension: as many as the image has, counted in each call."""

from typing import Any

from torch import Tensor, nn

from medi3d.inflation.fold import Fold
from medi3d.inflation.rules.base import Rule, adopt


def count_items(network: nn.Module, counters: dict[str, str], fold: Fold) -> None:
    """Let the rules that find several items of a slice in their batch count them, in place.

    Args:
        network: with its rules.
        counters: from the path of such a rule to that of the module around it that still saw whole slices.
        fold: of the network.
    """
    for path, around in counters.items():
        rule, block = network.get_submodule(path), network.get_submodule(around)
        steps = any(isinstance(m, Rule) and m is not block and m.depth.stride > 1 for m in block.modules())
        if not isinstance(rule, Rule) or steps:  # slices that it began with say nothing any more
            continue
        adopt(rule, ItemsOfSlices)
        if not isinstance(block, SlicesCounted):
            block.counted_by = fold  # type: ignore[assignment]
            adopt(block, SlicesCounted)


class SlicesCounted(nn.Module):
    """A block that knows how many slices a volume has; what it makes of them hides it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the block, `(B·D, ...)`."""
        fold: Any = self.counted_by
        with fold.counting(x.shape[0] // fold.batch):
            return super().forward(x, *args, **kwargs)


class ItemsOfSlices(nn.Module):
    """A rule in such a block: its items are counted, for they depend on the size of the image."""

    fold: Fold

    @property
    def multiplicity(self) -> int:
        """Items of each slice in the call that is running; of the dry run, where none is."""
        return self.fold.call.items or int(self.__dict__["multiplicity"])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the rule, `(B·D·q, ...)`."""
        call = self.fold.call
        with self.fold.running(call._replace(items=x.shape[0] // (call.batch * call.slices))):
            return super().forward(x, *args, **kwargs)
