"""Rules that keep the 2D layer's own code and parameters and add what it lacks along depth.

A convolution is replaced by its rule; a patch merging or an attention layer has code of its own
that must stay. Such a layer is *adopted*: its class becomes a subclass of the rule and of its
original class, so its parameters keep their names and its own forward is called.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medi3d import torchvision_shim
from medi3d.errors import PlanError
from medi3d.inflation.fold import Fold
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.base import (
    Geometry,
    Kind,
    Rule,
    adopt,
    attention_rule,
    register_attention_rule,
    register_rule,
)

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers import SpaceToDepth  # noqa: E402
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr  # noqa: E402
from timm.models.csatv2 import LearnableDct2d  # noqa: E402

_BLOCK_SIZE: dict[type, str] = {
    SpaceToDepth: "bs",
    LearnableDct2d: "k",
    nn.PixelUnshuffle: "downscale_factor",
}
_POINT: Geometry = ((1, 1), (1, 1), (1, 1))


class AdoptedRule(Rule):
    """A rule that becomes the layer's class instead of taking its place."""

    same = padded = False  # it pads nothing along depth

    @classmethod
    def of(
        cls, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> Rule:
        """Give `layer` this rule's behaviour along depth, in place."""
        kernel, stride, dilation = cls.geometry_of(layer)
        adopt(layer, cls)
        rule: Any = layer
        rule.depth, rule.fold, rule.profile, rule.multiplicity = depth, fold, profile, 1
        rule.kernel_2d, rule.stride_2d, rule.dilation_2d = kernel, stride, dilation
        return rule


@register_rule(
    LearnableDct2d,
    SpaceToDepth,
    nn.PixelUnshuffle,
    swin_transformer.PatchMerging,
    swin_transformer_v2.PatchMerging,
    swin_transformer_v2_cr.PatchMerging,
)
class MergingRule(AdoptedRule):
    """Merging of 2×2 patches into channels: the layer unchanged, then the mean of neighbouring slices.

    Exact because the mean of equal slices is the slice.
    """

    kind: ClassVar[Kind] = "resample"

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """Blocks of 2×2, unless the layer gives its own size."""
        size = int(getattr(layer, _BLOCK_SIZE.get(type(layer), ""), 2))
        return (size, size), (size, size), (1, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Like the wrapped layer, with `ceil(D / stride)` slices."""
        return mean_of_slices(super().forward(*args, **kwargs), self)  # type: ignore[misc]


@register_attention_rule("joint")
class AttentionRule(AdoptedRule):
    """Attention whose queries see the keys and values of neighbouring slices too.

    Exact because a softmax over n copies of the same keys gives each 1/n of the weight, and the
    weights of the copies sum back. Any layer that calls `scaled_dot_product_attention` can be
    adopted: only that call is widened; windows, positions and masks stay.
    """

    kind: ClassVar[Kind] = "attention"

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """One pixel: attention is not a window of voxels in-plane."""
        return _POINT

    @classmethod
    def under(cls, layer: nn.Module, depth: DepthLayer) -> type[Rule]:
        """The rule for the plan's form of attention; this one for joint attention over neighbours."""
        rule = attention_rule(depth)
        if issubclass(cls, rule):
            return cls
        if not rule.fits(layer):
            if depth.kernel == 1:  # no slices to join, in any form
                return cls
            form = f"attention_form {depth.attention_form!r} and attention {depth.kernel or 'all'}"
            raise PlanError(f"{type(layer).__name__} cannot have {form}: use 'joint' with a number of slices")
        return rule

    @classmethod
    def of(
        cls, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> Rule:
        """Adopt the layer, and make it call torch's attention instead of its own computation."""
        layer.fused_attn = True  # type: ignore[assignment]
        return super().of(layer, depth, fold, profile, channels)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Like the wrapped layer, with keys and values from `depth.kernel` slices."""
        slices = x.shape[0] // (self.fold.batch * self.multiplicity)
        with self.joining(slices) if self.depth.kernel != 1 and slices > 1 else nullcontext():
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def joining(self, slices: int) -> TorchFunctionMode:
        """While active, torch's attention joins slices."""
        return _NeighbouringKeys(self.fold.batch, slices, self.depth.kernel)


class JoinedAttention(TorchFunctionMode, ABC):
    """While active, `scaled_dot_product_attention` of slices `(B·D·q, ..., L, E)` calls `attend`."""

    def __init__(self, batch: int, slices: int) -> None:
        super().__init__()
        self.batch, self.slices = batch, slices

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value, *rest = args
        mask = rest.pop(0) if rest else kwargs.pop("attn_mask", None)
        return self.attend(partial(func, **kwargs), query, key, value, mask, *rest)

    @abstractmethod
    def attend(
        self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *options: Any
    ) -> Tensor:
        """Apply torch's `attention` with slices joined; `options`: mask or None, and other arguments."""


class _NeighbouringKeys(JoinedAttention):
    """Keys and values come from neighbouring slices too."""

    def __init__(self, batch: int, slices: int, reach: int) -> None:
        super().__init__(batch, slices)
        self.reach = reach

    def attend(
        self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *options: Any
    ) -> Tensor:
        """Apply `attention` with `reach` times as many keys."""
        mask, *rest = options
        if mask is not None:
            mask = mask.repeat(*[1] * (mask.dim() - 1), self.reach)
        return attention(query, self._widen(key), self._widen(value), mask, *rest)

    def _widen(self, tokens: Tensor) -> Tensor:
        """`(B·D·q, ..., L, E)` -> `(B·D·q, ..., reach·L, E)`; slices beyond the ends repeat the end."""
        by_slice = tokens.unflatten(0, (self.batch, self.slices, -1))
        here = torch.arange(self.slices, device=tokens.device)
        offsets = range(-(self.reach // 2), self.reach - self.reach // 2)
        parts = [by_slice[:, (here + offset).clamp(0, self.slices - 1)] for offset in offsets]
        return torch.cat(parts, dim=-2).flatten(0, 2)


def mean_of_slices(x: Tensor, rule: Rule) -> Tensor:
    """`(B·D·q, ...)` -> `(B·D'·q, ...)`: the mean of each `stride` slices, the last repeated to fill."""
    stride = rule.depth.stride
    if stride == 1:
        return x
    x = x.unflatten(0, (rule.fold.batch, -1, rule.multiplicity))
    missing = -x.shape[1] % stride
    if missing:
        x = torch.cat([x, *[x[:, -1:]] * missing], dim=1)
    return x.unflatten(1, (-1, stride)).mean(dim=2).flatten(0, 2)
