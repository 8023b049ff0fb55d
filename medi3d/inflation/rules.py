"""How each type of 2D layer is spread along depth: one small rule per type.

A rule is the layer's 3D twin. It takes and gives folded tensors `(B·D, C, H, W)`, and keeps the
law of inflation: where all slices of its input are equal, every slice of its output is what the
2D layer gives. Depth is always padded to "same", `D' = ceil(D / stride)`, so that branches of a
network meet with equal depth whatever their in-plane padding. Rules are found by the layer's type,
along its bases, so a subclass inherits the rule of its parent unless it has its own; what a rule
gets wrong, the proof (`verify`) finds. Add one for a layer of your own with `@register_rule(Type)`.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.axes import to_pair
from medi3d.errors import ShapeError
from medi3d.inflation.fold import Fold, merge_depth, pad_depth, split_depth
from medi3d.inflation.kernels import adapt_channels, depth_profile, inflate_kernel
from medi3d.inflation.plan import DepthLayer

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers import (  # noqa: E402
    AvgPool2dSame,
    BlurPool2d,
    Conv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
    pad_same,
)
from timm.layers.pool2d_same import MaxPool2dSame  # noqa: E402

_TENSORFLOW_SAME = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame, MaxPool2dSame, AvgPool2dSame)

Kind = Literal["conv", "max_pool", "avg_pool", "resample"]


class Rule(nn.Module):
    """The 3D twin of one 2D layer, running on folded tensors.

    Subclasses say what the 2D layer does in-plane (`geometry_of`), take its parameters over under
    the same names, and do the work of `forward`.
    """

    kind: ClassVar[Kind] = "conv"
    exact: bool = True
    """False where the chosen profile cannot equal the 2D layer by nature."""

    def __init__(self, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__()
        self.depth = depth
        self.fold = fold
        self.profile = profile
        self.multiplicity = 1
        padding = getattr(layer, "padding", 0)
        self.padded = any(padding) if isinstance(padding, (tuple, list)) else padding not in (0, "valid")
        self.same = isinstance(layer, _TENSORFLOW_SAME) and getattr(layer, "same_pad", True)
        self.kernel_2d, self.stride_2d, self.dilation_2d = self.geometry_of(layer)

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """In-plane kernel, stride and dilation of the 2D layer."""
        conv: Any = layer
        return to_pair(conv.kernel_size), to_pair(conv.stride), to_pair(getattr(conv, "dilation", 1))

    def extra_repr(self) -> str:
        """Kernel and stride as (depth, height, width), for `print(network)`."""
        kernel, stride = (self.depth.kernel, *self.kernel_2d), (self.depth.stride, *self.stride_2d)
        return f"kernel={kernel}, stride={stride}, depth_padding={self.depth.padding}"

    def depth_padding(self, slices: int) -> tuple[int, int]:
        """Slices to add before and after, so that ceil(slices / stride) positions come out.

        They are shared out as the layer shares out its padding in-plane: TensorFlow's "same" halves
        what is needed, torch starts half a kernel early, and a layer without padding starts inside.
        """
        if self.depth.padding == "valid":
            return 0, 0
        reach = (self.depth.kernel - 1) * self.depth.dilation + 1
        positions = -(-slices // self.depth.stride)
        total = (positions - 1) * self.depth.stride + reach - slices
        if self.same:
            leading = max(total, 0) // 2
        elif self.padded or self.depth.stride == 1:
            leading = (reach - 1) // 2
        else:
            leading = max(reach - self.depth.stride, 0) // 2
        return leading, total - leading


_RULES: dict[type[nn.Module], type[Rule]] = {}


def register_rule(*types: type[nn.Module]) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: this rule inflates layers of these types and of their subclasses."""

    def register(rule: type[Rule]) -> type[Rule]:
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def find_rule(layer: nn.Module) -> type[Rule] | None:
    """The rule for a layer: that of its own type, else of the nearest base class; None where none fits."""
    return next((_RULES[base] for base in type(layer).__mro__ if base in _RULES), None)


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


class PoolRule(Rule):
    """A pool: the 2D layer as it is, then the same pool along depth.

    Max and mean are separable, so in-plane options (ceil mode, whether padding counts, "same") come
    with the 2D layer. Along depth a pool never counts padding: the end slices are repeated, which
    for a maximum is the same as leaving them out.
    """

    def __init__(self, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__(layer, depth, fold, profile)
        self.layer = layer

    @staticmethod
    def combine(windows: list[Tensor]) -> Tensor:
        """Join the taps of a window."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D, C, H, W)` -> `(B·D', C, H', W')`."""
        x = self.layer(x)
        if self.depth.kernel == self.depth.stride == 1:
            return x
        volume = split_depth(x, self.fold.batch, self.multiplicity)
        reach = (self.depth.kernel - 1) * self.depth.dilation
        volume = pad_depth(volume, *self.depth_padding(volume.shape[2]), "replicate")
        reach = min(reach, volume.shape[2] - 1)  # a valid window longer than the clip is the whole clip
        taps = range(0, reach + 1, self.depth.dilation)
        end = volume.shape[2] - reach
        out = self.combine([volume[:, :, tap : end + tap : self.depth.stride] for tap in taps])
        return merge_depth(out, self.fold.batch, self.multiplicity)


@register_rule(nn.MaxPool2d)
class MaxPoolRule(PoolRule):
    """A maximum over space is the maximum over depth of the maxima in-plane."""

    kind: ClassVar[Kind] = "max_pool"

    @staticmethod
    def combine(windows: list[Tensor]) -> Tensor:
        """Maximum over the taps."""
        out = windows[0]
        for window in windows[1:]:
            out = torch.maximum(out, window)
        return out


@register_rule(nn.AvgPool2d)
class AvgPoolRule(PoolRule):
    """A mean over space is the mean over depth of the means in-plane."""

    kind: ClassVar[Kind] = "avg_pool"

    @staticmethod
    def combine(windows: list[Tensor]) -> Tensor:
        """Mean over the taps."""
        out = windows[0]
        for window in windows[1:]:
            out = out + window
        return out / len(windows)


@register_rule(BlurPool2d)
class BlurPoolRule(AvgPoolRule):
    """Anti-aliased down-sampling (Zhang 2019): the 2D blur, then a box of equal width along depth."""

    kind: ClassVar[Kind] = "resample"

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Filter size and stride of the blur."""
        return to_pair(layer.filt_size), to_pair(layer.stride), (1, 1)  # type: ignore[arg-type]
