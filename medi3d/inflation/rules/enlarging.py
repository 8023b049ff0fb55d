"""Rules for layers that enlarge: they restore depth where they restore height and width.

The *resolution* of a map gives its number of slices: each step along depth leaves ceil(D / stride)
slices, so a map that returns to stride s has ceil(D / s), for odd and even depths. The strides are
surveyed once when the network is built, see `reach.py`.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from monai.networks.blocks import SubpixelUpsample
from torch import Tensor, nn

from medi3d.axes import to_pair
from medi3d.errors import PlanError
from medi3d.inflation.fold import Fold, merge_depth, pad_depth, split_depth
from medi3d.inflation.kernels import Exactness, depth_profile
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.adopted import AdoptedRule
from medi3d.inflation.rules.base import Geometry, Kind, Rule, register_rule
from medi3d.inflation.rules.convolution import DepthConv


class EnlargingRule(Rule):
    """Base of the rules for layers that change the resolution.

    `passages` holds, for each resolution at which the layer runs, the in-plane stride of its input and the
    strides along depth before and after.
    """

    kind: ClassVar[Kind] = "upsample"
    mode, align_corners = "nearest", False

    def __init__(self, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__(layer, depth, fold, profile)
        self.passages: list[tuple[float, int, int]] = []

    def at(self, height: int) -> tuple[int, int]:
        """Strides along depth before and after, for an input of that height; the plan's before the survey."""
        if len(self.passages) < 2:
            if self.passages:
                return self.passages[0][1:]
            return (1, self.depth.stride) if self.kind == "resample" else (self.depth.stride, 1)
        scale = math.log2(self.fold.call.height / max(height, 1) + 1e-9)
        _, before, after = min(self.passages, key=lambda passage: abs(math.log2(passage[0]) - scale))
        return before, after

    def along_depth(self, x: Tensor, height: int, factor: int = 1) -> Tensor:
        """`(B·D, C, H, W)`, enlarged in-plane from `height` -> `(B·D', C, H, W)`.

        Args:
            x: the layer's output, with `factor` slices for each slice of its input.
            height: height of the layer's input, in pixels.
            factor: factor by which the layer itself has multiplied slices.
        """
        before, after = self.at(height)
        if before == after * factor and factor == 1:
            return x
        volume = split_depth(x, self.fold.batch, self.multiplicity)
        whole, have = self.fold.call.depth, volume.shape[2]
        wanted = (
            -(-whole // after) if -(-whole // before) * factor == have else have * before // after // factor
        )
        resized = resize_slices(volume, wanted, before / after / factor, self.mode, self.align_corners)
        return merge_depth(resized, self.fold.batch, self.multiplicity)


def resize_slices(
    volume: Tensor, slices: int, ratio: float, mode: str, align_corners: bool = False
) -> Tensor:
    """`(B, C, D, H, W)` -> `(B, C, slices, H, W)`: each slice gives `ratio` new ones.

    Slices are repeated (nearest), else interpolated linearly between their centres, as torch does in-plane.
    Exact because a mean of equal slices is the slice.
    """
    have = volume.shape[2]
    if mode.startswith("nearest") or have == 1:
        if ratio >= 1 and float(ratio).is_integer():
            return volume.repeat_interleave(int(ratio), dim=2)[:, :, :slices]
        source = torch.arange(slices, device=volume.device) / ratio
        return volume.index_select(2, source.long().clamp(max=have - 1))
    here = torch.arange(slices, device=volume.device, dtype=torch.float64)
    source = here * ((have - 1) / max(slices - 1, 1)) if align_corners else (here + 0.5) / ratio - 0.5
    source = source.clamp(0, have - 1)
    lower = source.long()
    upper = (lower + 1).clamp(max=have - 1)
    share = (source - lower).to(volume.dtype).view(-1, 1, 1)
    return torch.lerp(volume.index_select(2, lower), volume.index_select(2, upper), share)


@register_rule(nn.Upsample, nn.PixelShuffle)
class UpsampleRule(EnlargingRule):
    """Enlargement by interpolation or sub-pixels: the 2D layer, then slices repeated or interpolated."""

    def __init__(self, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__(layer, depth, fold, profile)
        self.layer = layer
        self.mode = str(getattr(layer, "mode", "nearest"))
        self.align_corners = bool(getattr(layer, "align_corners", False))

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """The stride is the enlargement factor; 1 if the layer has a target size or a fractional factor."""
        factor: Any = getattr(layer, "scale_factor", getattr(layer, "upscale_factor", None))
        height, width = factor if isinstance(factor, tuple) else (factor, factor)
        whole = all(f is not None and float(f).is_integer() for f in (height, width))
        return (1, 1), (int(height), int(width)) if whole else (1, 1), (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D, C, H, W)` -> `(B·D', C', H', W')`."""
        with self.fold.quiet():
            out = self.layer(x)
        return self.along_depth(out, x.shape[-2])


@register_rule(SubpixelUpsample)
class SubpixelRule(AdoptedRule, EnlargingRule):
    """MONAI's sub-pixel enlargement with its own convolution and blur, then slices repeated."""

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """The stride is the enlargement factor."""
        return (1, 1), to_pair(layer.scale_factor), (1, 1)  # type: ignore[arg-type]

    @classmethod
    def of(
        cls, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> Rule:
        """Adopt the layer."""
        rule: Any = super().of(layer, depth, fold, profile, channels)
        rule.passages = []
        return rule

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D, C, H, W)` -> `(B·D', C', H', W')`."""
        return self.along_depth(super().forward(x), x.shape[-2])  # type: ignore[misc]


@register_rule(nn.MaxUnpool2d)
class MaxUnpoolRule(EnlargingRule):
    """Max-unpooling: a maximum returns to its position in-plane, in each slice of its window.

    On equal slices a 3D pool would pick one of them, and a 3D unpool would fill only that one. So depth is
    enlarged by repetition: exact because each slice is filled as the 2D layer fills it.
    """

    def __init__(self, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__(layer, depth, fold, profile)
        self.layer = layer

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """The stride is the enlargement factor."""
        return (1, 1), to_pair(layer.stride), (1, 1)  # type: ignore[arg-type]

    def forward(self, x: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        """`(B·D, C, H, W)` and its indices `(B·D, C, H, W)` -> `(B·D', C, H', W')`."""
        with self.fold.quiet():
            out = self.layer(x, indices, None if output_size is None else output_size[-2:])
        return self.along_depth(out, x.shape[-2])


@register_rule(nn.ConvTranspose2d)
class TransposedConvRule(EnlargingRule):
    """A transposed convolution, spread over depth so that each new slice gets the whole 2D kernel.

    With a step s along depth, the taps j, j + s, j + 2s, ... meet in the same new slices: they, not all
    taps, share the kernel (1/n each, or all in one of them: the profile). Depth is first padded by
    repetition, so that the end slices have as many neighbours as the others.
    """

    def __init__(
        self,
        layer: nn.ConvTranspose2d,
        depth: DepthLayer,
        fold: Fold,
        profile: str,
        channels: int | None = None,
    ) -> None:
        super().__init__(layer, depth, fold, profile)
        if channels not in (None, layer.in_channels):
            raise PlanError(f"a transposed convolution cannot be the first layer for {channels} channels")
        step = depth.stride
        self.depth = DepthLayer(max(depth.kernel, step), step)
        for name in ("in_channels", "out_channels", "groups", "kernel_size", "stride", "padding", "dilation"):
            setattr(self, name, getattr(layer, name))
        self.padding_2d = to_pair(layer.padding)  # type: ignore[arg-type]
        self.output_padding = to_pair(layer.output_padding)
        factorised = profile == "factorised" and self.depth.kernel > step
        if factorised:  # 1×k×k, each slice repeated, then k×1×1
            self.depth = DepthLayer(step, step)
        self.weight = nn.Parameter(self.spread(layer.weight.detach()), layer.weight.requires_grad)
        self.bias = layer.bias
        self.along: DepthConv | None = None
        if factorised:
            self.along = DepthConv(layer.out_channels, layer.groups, depth.kernel).to(self.weight)

    @property
    def exact_on(self) -> Exactness:
        """Like every rule, but never where taps overlap with the profile `repeat`."""
        if self.profile == "repeat" and self.depth.kernel > self.depth.stride:
            return "never"
        return super().exact_on

    def spread(self, kernel: Tensor) -> Tensor:
        """`(I, O/g, kH, kW)` -> `(I, O/g, kD, kH, kW)`; taps that meet in one slice sum to the kernel."""
        taps, step = self.depth.kernel, self.depth.stride
        share = torch.zeros(taps, dtype=torch.float64)
        profile = self.profile if self.profile in ("mean", "centre", "repeat") else "mean"
        for phase in range(step):
            meeting = share[phase::step]
            meeting.copy_(depth_profile(len(meeting), profile))
        return (kernel.double().unsqueeze(2) * share.to(kernel.device).view(-1, 1, 1)).to(kernel.dtype)

    def flat_state(self) -> dict[str, Tensor]:
        """Parameters of the 2D layer that this one equals on boring volumes: taps of one slice, summed."""
        weight = self.weight.detach().double()
        state = {"weight": weight[:, :, :: self.depth.stride].sum(dim=2)}
        if self.profile == "repeat":
            state["weight"] /= len(range(0, self.depth.kernel, self.depth.stride))
        if self.bias is not None:
            state["bias"] = self.bias.detach().double()
        return state

    @property
    def learnt(self) -> bool:
        """Whether training has made the new slices of one slice differ: then no 2D layer equals it."""
        sums = [
            self.weight[:, :, j :: self.depth.stride].detach().double().sum(dim=2)
            for j in range(self.depth.stride)
        ]
        scale = sums[0].abs().amax().clamp_min(1e-300)
        apart = any(float((s - sums[0]).abs().amax() / scale) > 1e-5 for s in sums[1:])
        return apart and self.profile != "repeat"

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """`(B·D, I, H, W)` -> `(B·D', O, H', W')`."""
        added = self._output_padding(x, output_size)
        out, step = self._transposed(x, added), self.depth.stride
        if self.along is not None:
            volume = split_depth(out, self.fold.batch, self.multiplicity)
            reach = self.along.weight.shape[2] - 1
            volume = pad_depth(volume, reach // 2, reach - reach // 2, "replicate")
            out = merge_depth(self.along(volume, DepthLayer()), self.fold.batch, self.multiplicity)
        return self.along_depth(out, x.shape[-2], step)

    def _transposed(self, x: Tensor, added: tuple[int, int]) -> Tensor:
        options: dict[str, Any] = {"groups": self.groups}
        taps, step = self.depth.kernel, self.depth.stride
        if taps == 1:
            return F.conv_transpose2d(
                x,
                self.weight[:, :, 0],
                self.bias,
                self.stride_2d,
                self.padding_2d,
                added,
                dilation=self.dilation_2d,
                **options,
            )
        volume = split_depth(x, self.fold.batch, self.multiplicity)
        slices, more = volume.shape[2], -(-taps // step)
        start = more * step + min(max(self.padding_2d), taps - step)
        out = F.conv_transpose3d(
            pad_depth(volume, more, more, "replicate"),
            self.weight,
            self.bias,
            (step, *self.stride_2d),
            (0, *self.padding_2d),
            (0, *added),
            dilation=(1, *self.dilation_2d),
            **options,
        )
        return merge_depth(out[:, :, start : start + slices * step], self.fold.batch, self.multiplicity)

    def _output_padding(self, x: Tensor, output_size: Any) -> tuple[int, int]:
        """Rows and columns to add at the far ends, to reach the size that the caller asks for."""
        if output_size is None:
            return self.output_padding
        axes = zip(
            output_size[-2:], x.shape[-2:], self.stride_2d, self.padding_2d, self.kernel_2d,
            self.dilation_2d, strict=True,
        )  # fmt: skip
        height, width = (size - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for size, n, s, p, k, d in axes)
        return height, width
