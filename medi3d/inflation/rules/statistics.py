"""Rules for layers that take statistics over space: over the whole volume, if the plan says so.

Otherwise such a layer runs on each slice alone, which is exact too, and is the default of every plan.
Over the volume it is exact because D equal slices have the mean, the maximum, the variance and the root
mean square of one.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medi3d import torchvision_shim
from medi3d.inflation.fold import merge_depth, split_depth
from medi3d.inflation.kernels import Exactness
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.adopted import AdoptedRule
from medi3d.inflation.rules.base import Geometry, Kind, Rule, register_rule

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers import CecaModule, EcaModule, EffectiveSEModule, GatherExcite, GlobalContext  # noqa: E402
from timm.layers.cbam import ChannelAttn  # noqa: E402
from timm.layers.grn import GlobalResponseNorm  # noqa: E402
from timm.layers.selective_kernel import SelectiveKernelAttn  # noqa: E402
from timm.layers.split_attn import SplitAttn  # noqa: E402
from timm.layers.squeeze_excite import SEModule, SqueezeExciteCl  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite  # noqa: E402
from timm.models.focalnet import FocalModulation  # noqa: E402
from timm.models.hgnet import EseModule  # noqa: E402
from timm.models.senet import SEModule as SENetModule  # noqa: E402
from torchvision.ops.misc import SqueezeExcitation  # noqa: E402


class StatisticsRule(AdoptedRule):
    """A layer that keeps its code and parameters, and takes its statistics over the volume."""

    kind: ClassVar[Kind] = "statistics"

    @classmethod
    def under(cls, layer: nn.Module, depth: DepthLayer) -> type[Rule] | None:
        """None where statistics are those of a slice: then the 2D layer stays unchanged."""
        return cls if depth.statistics == "volume" else None

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """A single pixel: the layer has no kernel."""
        return (1, 1), (1, 1), (1, 1)

    @property
    def exact_on(self) -> Exactness:
        """Boring volumes: elsewhere a slice has other statistics than its volume."""
        return "boring"


@register_rule(
    CecaModule,
    ChannelAttn,
    EcaModule,
    EffectiveSEModule,
    EseModule,
    FocalModulation,
    GatherExcite,
    GlobalResponseNorm,
    SEModule,
    SENetModule,
    SelectiveKernelAttn,
    SplitAttn,
    SqueezeExcitation,
    SqueezeExcite,
    SqueezeExciteCl,
)
class SqueezeRule(StatisticsRule):
    """Squeeze-excitation and similar (Hu et al. 2018; ECA: Wang et al. 2020; GRN: Woo et al. 2023).

    Their code calls `mean`, `amax` or `norm` over two axes, or pools to one pixel. The result of such a
    call for each slice is joined over slices; a norm, which is a sum, as root mean square.
    """

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """All but gather-excite over parts of the slice, which takes no statistic of the whole slice."""
        return not isinstance(layer, GatherExcite) or (layer.extent == 0 and layer.gather is None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like the wrapped layer, with statistics of the volume."""
        with _OverVolume(self.fold.batch, self.multiplicity):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _root_mean_square(norms: Tensor) -> Tensor:
    return torch.linalg.vector_norm(norms, dim=1, keepdim=True) / norms.shape[1] ** 0.5


_JOIN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda means: means.mean(dim=1, keepdim=True),
    "adaptive_avg_pool2d": lambda means: means.mean(dim=1, keepdim=True),
    "amax": lambda maxima: maxima.amax(dim=1, keepdim=True),
    "norm": _root_mean_square,
}
"""A statistic of the volume from those of its slices, `(B, D, q, ...)` -> `(B, 1, q, ...)`."""


class _OverVolume(TorchFunctionMode):
    """While active, statistics over both axes of a slice are those of the volume."""

    def __init__(self, batch: int, multiplicity: int) -> None:
        super().__init__()
        self.batch, self.multiplicity = batch, multiplicity

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in _JOIN:
            return out
        if name == "adaptive_avg_pool2d":
            over_slice = tuple(out.shape[-2:]) == (1, 1)
        else:
            axes = kwargs.get("dim", args[1] if len(args) > 1 else None)
            over_slice = isinstance(axes, (tuple, list)) and len(axes) == 2
        return self._join(out, _JOIN[name]) if over_slice else out

    def _join(self, found: Tensor, join: Callable[[Tensor], Tensor]) -> Tensor:
        by_slice = found.unflatten(0, (self.batch, -1, self.multiplicity))
        return join(by_slice).expand_as(by_slice).flatten(0, 2)


@register_rule(nn.GroupNorm, nn.InstanceNorm2d, GlobalContext)
class OneSliceRule(StatisticsRule):
    """Group norm, instance norm, global context: the layer sees the slices of a volume as one tall slice."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D, C, H, W)` -> `(B·D, C, H, W)`; vectors `(B·D, C)` have no spatial axes: each slice alone."""
        if x.dim() != 4:
            return super().forward(x)  # type: ignore[misc]
        volume = split_depth(x, self.fold.batch, self.multiplicity)  # (B, C, D, H, W)
        out = super().forward(volume.flatten(2, 3))  # type: ignore[misc]
        return merge_depth(out.view(volume.shape), self.fold.batch, self.multiplicity)


@register_rule(nn.LayerNorm)
class SpaceNormRule(StatisticsRule):
    """A layer norm over space, with a weight for each position: each position keeps its own in all slices."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Layer norms over channels alone take no statistic over space."""
        return len(layer.normalized_shape) > 1  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D, ..., *normalized_shape)`, unchanged in shape."""
        layer: Any = self
        by_slice = x.unflatten(0, (self.fold.batch, -1, self.multiplicity))
        axes = [1, *range(-len(layer.normalized_shape), 0)]
        variance, mean = torch.var_mean(by_slice, dim=axes, correction=0, keepdim=True)
        out = ((by_slice - mean) * torch.rsqrt(variance + layer.eps)).flatten(0, 2)
        if layer.weight is None:
            return out
        return torch.addcmul(layer.bias, out, layer.weight) if layer.bias is not None else out * layer.weight
