"""Rules for convolutions: the kernel is spread over depth by a profile that sums to one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.axes import to_pair
from medi3d.errors import ShapeError
from medi3d.inflation.fold import Fold, merge_depth, pad_depth, split_depth
from medi3d.inflation.kernels import adapt_channels, depth_profile, inflate_kernel
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.base import Rule, register_rule

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same  # noqa: E402


@register_rule(nn.Conv2d)
class ConvRule(Rule):
    """A convolution: its kernel spread over depth by a profile that sums to one.

    Exact because on equal slices the taps see the same numbers, and their weights sum to the 2D
    kernel. In-plane padding stays as it was, with zeros, "same" as TensorFlow has it, or mirrored.
    """

    def __init__(
        self, layer: nn.Conv2d, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> None:
        super().__init__(layer, depth, fold, profile)
        self.exact = profile != "repeat" or depth.kernel == 1
        self.groups = layer.groups
        self.padding_2d = self._symmetric_padding(layer)
        self.padding_mode = layer.padding_mode
        kernel = self.first_kernel(layer.weight.detach(), channels)
        self.weight = nn.Parameter(inflate_kernel(kernel, depth.kernel, profile), layer.weight.requires_grad)
        self.bias = layer.bias

    def kernel(self) -> Tensor:
        """The kernel `(O, I, kD, kH, kW)` that the convolution uses."""
        return self.weight

    def first_kernel(self, kernel: Tensor, channels: int | None) -> Tensor:
        """The 2D kernel to inflate where this layer, the network's first, takes `channels` channels.

        Raises:
            ShapeError: a grouped convolution cannot take another number of channels.
        """
        if channels is None or channels == kernel.shape[1] * self.groups:
            return kernel
        if self.groups != 1:
            raise ShapeError(
                f"the first convolution has {self.groups} groups; it cannot take {channels} channels"
            )
        return adapt_channels(kernel, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D, C, H, W)` -> `(B·D', O, H', W')`."""
        x, padding = self._pad_in_plane(x)
        weight, depth = self.kernel(), self.depth
        if depth.kernel == depth.stride == 1:
            return F.conv2d(
                x, weight[:, :, 0], self.bias, self.stride_2d, padding, self.dilation_2d, self.groups
            )
        volume = split_depth(x, self.fold.batch, self.multiplicity)  # (B, C, D, H, W)
        volume = pad_depth(volume, *self.depth_padding(volume.shape[2]), depth.padding)
        out = F.conv3d(
            volume,
            weight,
            self.bias,
            stride=(depth.stride, *self.stride_2d),
            padding=(0, *padding),
            dilation=(depth.dilation, *self.dilation_2d),
            groups=self.groups,
        )
        return merge_depth(out, self.fold.batch, self.multiplicity)

    def _symmetric_padding(self, layer: nn.Conv2d) -> tuple[int, int]:
        if self.same or layer.padding == "valid":
            return (0, 0)
        if layer.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation_2d, self.kernel_2d, strict=True)]
            if any(t % 2 for t in total):
                raise ShapeError(
                    f"an even kernel {self.kernel_2d} with padding='same' has no symmetric padding"
                )
            return (total[0] // 2, total[1] // 2)
        return to_pair(layer.padding)  # type: ignore[arg-type]

    def _pad_in_plane(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if self.same:
            return pad_same(x, list(self.kernel_2d), list(self.stride_2d), list(self.dilation_2d)), (0, 0)
        if self.padding_mode == "zeros" or self.padding_2d == (0, 0):
            return x, self.padding_2d
        height, width = self.padding_2d
        return F.pad(x, (width, width, height, height), mode=self.padding_mode), (0, 0)


@register_rule(StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
class StdConvRule(ConvRule):
    """A weight-standardised convolution (Qiao et al. 2019; NFNets: Brock et al. 2021).

    Mean and variance are those of the kernel collapsed along depth, which at the start is the 2D
    kernel whatever the profile; the mean is taken off in the profile's proportions. So the
    standardised kernel is the inflated standardised 2D kernel, exactly.
    """

    def __init__(
        self, layer: nn.Conv2d, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> None:
        super().__init__(layer, depth, fold, profile, channels)
        self.eps = float(layer.eps)  # type: ignore[arg-type]
        self.scale = float(getattr(layer, "scale", 1.0))
        self.gain = getattr(layer, "gain", None)

    def first_kernel(self, kernel: Tensor, channels: int | None) -> Tensor:
        """The kernel as it is: it is standardised over its own channels, and adapted after that."""
        self.channels = channels or kernel.shape[1]
        if self.groups != 1:
            return super().first_kernel(kernel, channels)
        return kernel

    def kernel(self) -> Tensor:
        """The standardised kernel `(O, I, kD, kH, kW)`."""
        flat = self.weight.sum(dim=2).flatten(1)
        variance, mean = torch.var_mean(flat, dim=1, correction=0)
        factor = self.scale * torch.rsqrt(variance + self.eps)
        if self.gain is not None:
            factor = factor * self.gain.flatten()
        share = depth_profile(self.depth.kernel, self.profile).to(self.weight)
        centred = self.weight - mean.view(-1, 1, 1, 1, 1) * share.view(1, 1, -1, 1, 1)
        return adapt_channels(centred * factor.view(-1, 1, 1, 1, 1), self.channels)
