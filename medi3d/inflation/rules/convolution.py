"""Rules for convolutions: the profile decides how the kernel is spread over depth, see `kernels.PROFILES`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.axes import to_pair
from medi3d.errors import InexactError, ShapeError
from medi3d.inflation.fold import Fold, merge_depth, pad_depth, split_depth
from medi3d.inflation.kernels import (
    PROFILES,
    Exactness,
    adapt_channels,
    collapse_kernel,
    depth_profile,
    inflate_kernel,
    place_in_planes,
)
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.base import Rule, register_rule
from medi3d.onednn import convolve

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers import (  # noqa: E402
    Conv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
    pad_same,
)


class DepthConv(nn.Module):
    """The k×1×1 half of a factorised convolution; it starts as identity: 1 in the middle tap.

    It mixes the output channels of each group of the 2D convolution. At the start it is exact on any
    volume. R(2+1)D's norm and activation between the two halves are left out: the 2D network has none
    there.
    """

    def __init__(self, channels: int, groups: int, taps: int) -> None:
        super().__init__()
        width = channels // groups
        weight = torch.zeros(channels, width, taps, 1, 1)
        rows = torch.arange(channels)
        weight[rows, rows % width, (taps - 1) // 2] = 1
        self.weight = nn.Parameter(weight)
        self.groups = groups

    def forward(self, volume: Tensor, depth: DepthLayer) -> Tensor:
        """`(B, C, D, H, W)`, already padded along depth -> `(B, C, D', H, W)`."""
        step, dilation = (depth.stride, 1, 1), (depth.dilation, 1, 1)
        return F.conv3d(volume, self.weight, stride=step, dilation=dilation, groups=self.groups)

    def fold_into(self, kernel: Tensor) -> Tensor:
        """The 2D kernel (or bias) of both halves on boring volumes: output channels mixed, `(O, ...)`."""
        mix = self.weight.detach().sum(dim=2).flatten(1).to(kernel)  # (O, O / groups)
        mix = mix.unflatten(0, (self.groups, -1))
        return torch.einsum("gpo,go...->gp...", mix, kernel.unflatten(0, (self.groups, -1))).flatten(0, 1)


_ASKED_FOR = ("kernel_size", "stride", "padding", "dilation", "in_channels", "out_channels")
"""Attributes that code around a convolution reads from it; in-plane, as in 2D."""


@register_rule(nn.Conv2d, Conv2dSame)
class ConvRule(Rule):
    """A convolution, its kernel spread over depth.

    Profiles that sum to one are exact because on equal slices the taps see the same numbers, and
    their weights sum to the 2D kernel. A factorised layer keeps its kernel 1×k×k and has a second
    convolution, `along_depth`; ACS keeps it 1×k×k too and lays it into planes in every forward pass, so
    it has no more parameters than in 2D. In-plane padding stays: zeros, TensorFlow's "same", or
    mirrored.
    """

    def __init__(
        self, layer: nn.Conv2d, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> None:
        super().__init__(layer, depth, fold, profile)
        self.groups = layer.groups
        self.same_by_size = False
        self.padding_2d = self._symmetric_padding(layer)
        self.padding_mode = layer.padding_mode
        kernel = self.first_kernel(layer.weight.detach(), channels)
        self.planes = profile == "acs" and depth.kernel > 1
        if self.planes and self.kernel_2d != (depth.kernel, depth.kernel):
            raise ShapeError(
                f"profile acs needs k×k kernels and as many taps along depth, not {self.kernel_2d} and "
                f"{depth.kernel} taps"
            )
        factorised = profile == "factorised" and depth.kernel > 1
        taps = 1 if self.planes or factorised else depth.kernel
        trained = layer.weight.requires_grad
        self.weight = nn.Parameter(inflate_kernel(kernel, taps, profile), trained)
        self.bias = layer.bias
        for name in _ASKED_FOR:
            setattr(self, name, getattr(layer, name))
        self.along_depth: DepthConv | None = None
        if factorised:
            self.along_depth = DepthConv(layer.out_channels, layer.groups, depth.kernel).to(self.weight)

    @property
    def exact_on(self) -> Exactness:
        """The profile's guarantee; with a step along depth or one tap, that of every rule."""
        promised = PROFILES[self.profile]
        if self.depth.kernel == 1 or (promised == "any" and self.depth.stride > 1):
            return super().exact_on
        return promised

    def kernel(self) -> Tensor:
        """The kernel `(O, I, kD, kH, kW)` that the convolution uses."""
        return self._laid(self.weight)

    def spread(self, kernel: Tensor) -> Tensor:
        """A 2D kernel spread over the taps of this layer."""
        return inflate_kernel(kernel, self.weight.shape[2])

    def _laid(self, kernel: Tensor) -> Tensor:
        return place_in_planes(kernel[:, :, 0]) if self.planes else kernel

    def flat_state(self) -> dict[str, Tensor]:
        """Parameters, in float64, of the 2D layer that this one equals on boring volumes.

        With the profiles acs and repeat it equals none: then those of the 2D layer that it was made from.

        Raises:
            InexactError: there is no such layer.
        """
        state = {"weight": collapse_kernel(self.weight.detach().double())}
        if self.profile == "repeat":  # the 2D layer that it was made from: each tap holds the whole kernel
            state["weight"] /= self.weight.shape[2]
        if self.bias is not None:
            state["bias"] = self.bias.detach().double()
        if self.along_depth is not None:
            state = {name: self.along_depth.fold_into(tensor) for name, tensor in state.items()}
        return state

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
        if self.along_depth is not None or depth.kernel == depth.stride == 1:
            out = convolve(
                x, weight[:, :, 0], self.bias, self.stride_2d, padding, self.dilation_2d, self.groups
            )
            return out if self.along_depth is None else self._along_depth(out, self.along_depth)
        volume, depth_padding = self._unfolded(x)
        out = convolve(
            volume,
            weight,
            self.bias,
            stride=(depth.stride, *self.stride_2d),
            padding=(depth_padding, *padding),
            dilation=(depth.dilation, *self.dilation_2d),
            groups=self.groups,
        )
        return merge_depth(out, self.fold.batch, self.multiplicity)

    def _along_depth(self, x: Tensor, layer: DepthConv) -> Tensor:
        volume = self._padded(split_depth(x, self.fold.batch, self.multiplicity))
        return merge_depth(layer(volume, self.depth), self.fold.batch, self.multiplicity)

    def _unfolded(self, x: Tensor) -> tuple[Tensor, int]:
        """`(B·D, C, H, W)` -> `(B, C, D, H, W)`, and the number of zeros to add at both ends of depth.

        Other padding, unequal or not of zeros, is already in the volume.
        """
        volume = split_depth(x, self.fold.batch, self.multiplicity)
        reach = (self.depth.kernel - 1) * self.depth.dilation
        if self.depth.padding == "zeros" and self.depth.stride == 1 and reach % 2 == 0:
            return volume, reach // 2
        return self._padded(volume), 0

    def _padded(self, volume: Tensor) -> Tensor:
        return pad_depth(volume, *self.depth_padding(volume.shape[2]), self.depth.padding)

    def _symmetric_padding(self, layer: nn.Conv2d) -> tuple[int, int]:
        if layer.padding == "valid":
            return (0, 0)
        total = [d * (k - 1) for d, k in zip(self.dilation_2d, self.kernel_2d, strict=True)]
        if self.same:
            # With a step, or an even kernel, TensorFlow's "same" may have one more on one side.
            self.same_by_size = self.stride_2d != (1, 1) or any(t % 2 for t in total)
            return (0, 0) if self.same_by_size else (total[0] // 2, total[1] // 2)
        if layer.padding == "same":
            if any(t % 2 for t in total):
                raise ShapeError(
                    f"an even kernel {self.kernel_2d} with padding='same' has no symmetric padding"
                )
            return (total[0] // 2, total[1] // 2)
        return to_pair(layer.padding)  # type: ignore[arg-type]

    def _pad_in_plane(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if self.same_by_size:
            return pad_same(x, list(self.kernel_2d), list(self.stride_2d), list(self.dilation_2d)), (0, 0)
        if self.padding_mode == "zeros" or self.padding_2d == (0, 0):
            return x, self.padding_2d
        height, width = self.padding_2d
        return F.pad(x, (width, width, height, height), mode=self.padding_mode), (0, 0)


@register_rule(StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
class StdConvRule(ConvRule):
    """A weight-standardised convolution (Qiao et al. 2019; NFNets: Brock et al. 2021).

    Mean and variance are those of the kernel collapsed along depth, which at the start is the 2D
    kernel for every profile; the mean is subtracted in the profile's proportions. So the
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
        """The kernel unchanged: it is standardised over its own channels, and adapted after that."""
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
        share = depth_profile(self.weight.shape[2], self.profile).to(self.weight)
        centred = self.weight - mean.view(-1, 1, 1, 1, 1) * share.view(1, 1, -1, 1, 1)
        return self._laid(adapt_channels(centred * factor.view(-1, 1, 1, 1, 1), self.channels))

    def flat_state(self) -> dict[str, Tensor]:
        """Like `ConvRule.flat_state`, but a standardised kernel cannot absorb the mixing of channels."""
        state, kernel = super().flat_state(), collapse_kernel(self.weight.detach().double())
        if self.along_depth is not None and not torch.equal(state["weight"], kernel):
            raise InexactError("a trained k×1×1 after a standardised convolution equals no 2D layer")
        return state
