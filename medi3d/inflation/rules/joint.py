"""The rule for attention over all slices of a volume."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medi3d.inflation.rules.adopted import AttentionRule, JoinedAttention
from medi3d.inflation.rules.base import register_attention_rule


@register_attention_rule("joint-all")
class JointAllRule(AttentionRule):
    """Attention among the positions of all slices of a volume (TimeSformer's joint space-time attention).

    Exact for the same reason as among neighbours: each of D copies of a key gets 1/D of its weight.
    """

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Layers with timm's switch for torch's attention."""
        return hasattr(layer, "fused_attn")

    def joining(self, slices: int) -> TorchFunctionMode:
        """While active, torch's attention sees a volume as one long slice."""
        return _OneSlice(self.fold.batch, slices)


class _OneSlice(JoinedAttention):
    """Treat all slices of a volume as one."""

    def attend(
        self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *options: Any
    ) -> Tensor:
        """Apply `attention` to one long slice, then split the result into slices."""
        mask, *rest = options
        if mask is not None:
            mask = self._widen(mask, query.shape[0])
        out = attention(self._join(query), self._join(key), self._join(value), mask, *rest)
        out = out.unflatten(-2, (self.slices, -1)).unflatten(0, (self.batch, -1))
        return out.movedim(-3, 1).flatten(0, 2)

    def _join(self, tokens: Tensor) -> Tensor:
        """`(B·D·q, ..., L, E)` -> `(B·q, ..., D·L, E)`"""
        by_slice = tokens.unflatten(0, (self.batch, self.slices, -1))
        return by_slice.movedim(1, -3).flatten(-3, -2).flatten(0, 1)

    def _widen(self, mask: Tensor, items: int) -> Tensor:
        """A mask `(..., L, L)`, the same for all slices or `(B·D·q, ..., L, L)` -> `(..., D·L, D·L)`."""
        mask = mask.repeat(*[1] * (mask.dim() - 1), self.slices)
        if mask.dim() > 2 and mask.shape[0] == items:
            return self._join(mask)
        return mask.repeat(*[1] * (mask.dim() - 2), self.slices, 1)
