"""Rules for layers that drop at random in training: one draw for each volume, not for each slice."""

from typing import ClassVar

from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.inflation.fold import Fold
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.base import Geometry, Kind, Rule, register_rule

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers import DropPath  # noqa: E402


@register_rule(DropPath)
class DropPathRule(Rule):
    """Stochastic depth (Huang et al. 2016): a residual branch is dropped for a whole volume."""

    kind: ClassVar[Kind] = "other"

    def __init__(self, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__(layer, depth, fold, profile)
        self.drop_prob = float(layer.drop_prob)  # type: ignore[arg-type]
        self.scale_by_keep = bool(layer.scale_by_keep)

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """A single pixel: the layer has no kernel."""
        return (1, 1), (1, 1), (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D·q, ...)` -> the same shape; unchanged in evaluation."""
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        batch = self.fold.batch
        mask = x.new_empty(batch, *[1] * x.dim()).bernoulli_(keep)  # (B, 1, 1, ...)
        if self.scale_by_keep and keep > 0:
            mask = mask / keep
        return (x.unflatten(0, (batch, -1)) * mask).flatten(0, 1)
