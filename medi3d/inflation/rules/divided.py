"""The rule for divided space-time attention: each block first attends over depth, then within its slice."""

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medi3d.errors import PlanError
from medi3d.inflation.fold import Fold
from medi3d.inflation.kernels import Exactness
from medi3d.inflation.plan import ALL_SLICES, DepthLayer
from medi3d.inflation.rules.adopted import AdoptedRule
from medi3d.inflation.rules.base import Geometry, Kind, adopt, register_attention_rule
from medi3d.inflation.rules.stochastic import DropPathRule


@register_attention_rule("divided")
class DividedRule(AdoptedRule):
    """Attention within slices, in a block that attends over depth first (TimeSformer: Bertasius et al. 2021).

    The block gets `temporal_norm1`, `temporal_attn` and `temporal_fc`, named as in the authors' code. The
    first two start as copies of the block's own norm and attention; the last, a linear layer, starts at zero.
    So the block starts as the 2D block on any volume. Class tokens have no position and take no part in
    attention over depth. With statistics over the volume, the volume has one: what attention adds
    to it is averaged over slices, as TimeSformer does.
    """

    kind: ClassVar[Kind] = "attention"
    prefix: int
    """Number of class and register tokens before those with a position."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether the attention has one linear layer for queries, keys and values, and one for the result."""
        inner, outer = getattr(layer, "qkv", None), getattr(layer, "proj", None)
        if not (isinstance(inner, nn.Linear) and isinstance(outer, nn.Linear)):
            return False
        width = inner.in_features
        return inner.out_features == 3 * width and outer.in_features == outer.out_features == width

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """One pixel: attention is not a window of voxels in-plane."""
        return (1, 1), (1, 1), (1, 1)

    def settle(self, network: nn.Module, path: str) -> None:
        """Add attention over depth to the block around this layer.

        Raises:
            PlanError: the layer is not in a transformer block like TimeSformer's.
        """
        parents = ["", *_prefixes(path)]
        block: Any = network.get_submodule(parents[-1])
        own: Any = self
        counts = [getattr(network.get_submodule(parent), "num_prefix_tokens", None) for parent in parents]
        self.prefix = next((count for count in reversed(counts) if count is not None), 0)
        if self.depth.kernel == 1:
            return
        windows = self.multiplicity > 1 and not hasattr(block, "window_size")  # the block sees them as slices
        if not isinstance(getattr(block, "norm1", None), nn.LayerNorm) or block.attn is not self or windows:
            raise PlanError(
                f"layer {path!r}: divided attention needs a block with `norm1` and whole slices around it, "
                f"as a vision transformer has, not {type(block).__name__}: use joint attention"
            )
        block.temporal_norm1 = copy.deepcopy(block.norm1)
        block.temporal_attn = DepthAttention(self, self.fold, self.depth.kernel)
        block.temporal_fc = nn.Linear(own.proj.in_features, own.proj.out_features).to(own.proj.weight)
        drop: Any = getattr(block, "drop_path1", None)
        block.temporal_drop_path = nn.Identity()
        if getattr(drop, "drop_prob", 0):
            block.temporal_drop_path = DropPathRule(drop, DepthLayer(), self.fold, self.profile)
        nn.init.zeros_(block.temporal_fc.weight)
        nn.init.zeros_(block.temporal_fc.bias)
        self._last = (block.temporal_fc,)  # in a tuple: it is the block's, not this layer's
        adopt(block, DividedBlock)

    @property
    def exact_on(self) -> Exactness:
        """Any volume, by its initial state; boring ones where slices share class tokens."""
        return "boring" if self._shares() else "any"

    @property
    def learnt(self) -> bool:
        """Whether the attention over depth adds anything."""
        return any(bool(p.any()) for layer in getattr(self, "_last", ()) for p in layer.parameters())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Like the wrapped layer, `(B·D, tokens, C)`; class tokens of the volume are averaged over slices."""
        out = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not self._shares():
            return out
        by_slice = out[:, : self.prefix].unflatten(0, (self.fold.batch, -1))
        mean = by_slice.mean(dim=1, keepdim=True).expand_as(by_slice).flatten(0, 1)
        return torch.cat([mean, out[:, self.prefix :]], dim=1)

    def _shares(self) -> bool:
        return self.depth.statistics == "volume" and self.prefix > 0


class DividedBlock(nn.Module):
    """A transformer block with attention over depth before its own, as a residual branch."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Like the wrapped block, on `(B·D, tokens, C)` or `(B·D, H, W, C)`."""
        block: Any = self
        tokens, places = x[:, : block.attn.prefix], x[:, block.attn.prefix :]
        change = block.temporal_attn(block.temporal_norm1(places))
        places = places + block.temporal_fc(block.temporal_drop_path(change))
        return super().forward(torch.cat([tokens, places], dim=1), *args, **kwargs)


class DepthAttention(nn.Module):
    """Attention of each position to itself in other slices; starts as a copy of an in-plane attention."""

    def __init__(self, attention: nn.Module, fold: Fold, reach: int) -> None:
        super().__init__()
        source: Any = attention
        self.fold, self.reach = fold, reach
        self.num_heads = source.num_heads
        self.qkv = copy.deepcopy(source.qkv)
        self.proj = copy.deepcopy(source.proj)

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D, ..., C)` -> `(B·D, ..., C)`."""
        volume = x.unflatten(0, (self.fold.batch, -1)).flatten(2, -2).transpose(1, 2)  # (B, places, D, C)
        slices = volume.shape[2]
        heads = self.qkv(volume).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
        query, key, value = heads.flatten(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, self._band(slices, x.device))
        out = self.proj(out.transpose(1, 2).flatten(2)).unflatten(0, volume.shape[:2])
        return out.transpose(1, 2).reshape(x.shape)

    def _band(self, slices: int, device: torch.device) -> Tensor | None:
        """Which slices see each other, `(D, D)`; None: all."""
        if self.reach == ALL_SLICES or self.reach >= 2 * slices - 1:
            return None
        here = torch.arange(slices, device=device)
        offset = here[None, :] - here[:, None]
        return (offset >= -(self.reach // 2)) & (offset < self.reach - self.reach // 2)


def _prefixes(path: str) -> list[str]:
    """Paths of the modules around the one at `path`, outermost first, without the root."""
    names = path.split(".")[:-1]
    return [".".join(names[: end + 1]) for end in range(len(names))]
