"""The rule for blocks that shrink their output but keep using the batch size of their input."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.axes import to_pair
from medi3d.inflation.rules.adopted import AdoptedRule, mean_of_slices
from medi3d.inflation.rules.base import Geometry, Kind, register_rule

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers.halo_attn import HaloAttn  # noqa: E402
from timm.models import hieradet_sam2, mvitv2, pit  # noqa: E402
from timm.models._efficientnet_blocks import CondConvResidual  # noqa: E402
from timm.models.efficientformer_v2 import Attention2dDownsample  # noqa: E402

_STEP: dict[type[nn.Module], Callable[[Any], Any]] = {
    Attention2dDownsample: lambda block: 2,
    CondConvResidual: lambda block: block.conv_dw.stride,
    HaloAttn: lambda block: block.block_stride * (1 if isinstance(block.pool, nn.Identity) else 2),
    hieradet_sam2.MultiScaleBlock: lambda block: block.q_stride or 1,
    pit.Pooling: lambda block: block.conv.stride,
    mvitv2.MultiScaleBlock: lambda block: getattr(block.shortcut_pool_attn, "stride", 1),
}


@register_rule(*_STEP)
class SteppingRule(AdoptedRule):
    """A block whose layers keep all slices, and whose output is their mean over each step.

    Queries at fewer positions than keys, or a batch size read at the start, rule out a step
    inside. Exact because the block is then the 2D block on each slice, and the mean of equal slices
    is the slice.
    """

    kind: ClassVar[Kind] = "resample"

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """In-plane step of the whole block."""
        step = next(to_pair(_STEP[base](layer)) for base in type(layer).__mro__ if base in _STEP)
        return step, step, (1, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like the wrapped block, with `ceil(D / stride)` slices; some return class tokens or a size too."""
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(out, tuple):
            return tuple(mean_of_slices(part, self) if isinstance(part, Tensor) else part for part in out)
        return mean_of_slices(out, self)
