"""The rule for convolutions whose kernels the network computes for each slice."""

from typing import Any, ClassVar

from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.inflation.fold import Fold, merge_depth, pad_depth, split_depth
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.adopted import AdoptedRule
from medi3d.inflation.rules.base import Kind, Rule, register_rule
from medi3d.inflation.rules.pooling import AvgPoolRule, depth_windows

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers import CondConv2d  # noqa: E402


@register_rule(CondConv2d)
class GeneratedConvRule(AdoptedRule):
    """A convolution with kernels computed from its input (CondConv: Yang et al. 2019, arXiv:1904.04971).

    There is no single kernel to spread over depth. Each slice is convolved with its own, then averaged
    over as many slices as the kernel has taps: on equal slices, the mean is the slice.
    """

    kind: ClassVar[Kind] = "conv"

    @classmethod
    def of(
        cls, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> Rule:
        """Adopt the layer; its kernels, computed in every call, take no profile."""
        rule = super().of(layer, depth, fold, profile, channels)
        rule.padded, rule.same = True, False
        return rule

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """`(B·D, C, H, W)` and the input of the kernels -> `(B·D', O, H', W')`."""
        x = super().forward(*args, **kwargs)  # type: ignore[misc]
        if self.depth.kernel == self.depth.stride == 1:
            return x
        volume = split_depth(x, self.fold.batch, self.multiplicity)
        volume = pad_depth(volume, *self.depth_padding(volume.shape[2]), self.depth.padding)
        return merge_depth(
            AvgPoolRule.combine(depth_windows(volume, self.depth)), self.fold.batch, self.multiplicity
        )
