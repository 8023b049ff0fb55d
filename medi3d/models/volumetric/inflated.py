"""Merlin's encoder: torchvision's ResNet-152, inflated by our rules."""

from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.inflation.network import build
from medi3d.inflation.plan import KernelPlan, Override
from medi3d.inflation.rules import ConvRule
from medi3d.models.pyramid import extract_pyramid
from medi3d.models.volumetric.encoder import VolumetricEncoder

torchvision_shim.install()
import torchvision  # noqa: E402 - torchvision needs the shim

MERLIN = KernelPlan(name="merlin", padding="zeros", overrides=(Override("conv1", kernel=3, stride=1),))
"""Like `isotropic`, but the stem spans three slices without stride; depth is padded with zeros.

merlin/models/i3res.py of merlin-vlm 0.0.7; its kernels start in the middle tap (profile `centre`).
"""


class Merlin(VolumetricEncoder):
    """Merlin's image encoder (Blankemeier et al. 2024, arXiv:2406.06512), an I3ResNet.

    Maps: the stem at strides (1, 2, 2), then (2, 4, 4), (4, 8, 8), (8, 16, 16) and (16, 32, 32). Its axes are
    (z to superior, x to right, y to anterior): the volume is turned for it, and its maps are turned back.

    Args:
        in_channels: channels of the input; it was trained on one, repeated three times.
        levels: number of maps to return; None: all five.
        net2d: a ResNet of torchvision whose weights are used; None: a ResNet-152 with random kernels.
    """

    def __init__(
        self, in_channels: int = 1, levels: int | None = None, *, net2d: nn.Module | None = None
    ) -> None:
        super().__init__()
        pyramid = extract_pyramid(net2d or torchvision.models.resnet152(), levels)
        self.inflated, _ = build(pyramid, MERLIN, profile="centre", in_channels=in_channels)
        for rule in self.inflated.rules().values() if net2d is None else ():
            if isinstance(rule, ConvRule):  # or it would ignore neighbouring slices at first
                nn.init.kaiming_normal_(rule.weight, mode="fan_out", nonlinearity="relu")
        self.in_channels, self.normaliser = in_channels, None
        self.out_channels, self.strides = self.inflated.out_channels, self.inflated.strides

    @property
    def filled(self) -> nn.Module:
        """The inflated network."""
        return self.inflated

    def maps(self, volume: Tensor) -> list[Tensor]:
        """Maps of the stem and the stages."""
        turned = volume.flip(3, 4).transpose(3, 4)
        return [x.transpose(3, 4).flip(3, 4) for x in self.inflated(turned)]
