"""Rules for pools and anti-aliased down-sampling: the 2D layer unchanged, then the same along depth."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.axes import to_pair
from medi3d.inflation.fold import Fold, merge_depth, pad_depth, split_depth
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.base import Kind, Rule, register_rule

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers import BlurPool2d, get_same_padding  # noqa: E402


class PoolRule(Rule):
    """A pool: the 2D layer unchanged, then the same pool along depth.

    Max and mean are separable, so in-plane options (ceil mode, whether padding counts, "same") come
    with the 2D layer. Along depth a pool never counts padding: the end slices are repeated, which
    does not change a maximum.
    """

    def __init__(self, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__(layer, depth, fold, profile)
        self.layer = layer

    @staticmethod
    def combine(windows: list[Tensor]) -> Tensor:
        """Join the taps of a window."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        """`(B·D, C, H, W)` -> `(B·D', C, H', W')`."""
        with self.fold.quiet():
            x = self.layer(x)
        return self.along_depth(x)

    def along_depth(self, x: Any) -> Any:
        """The half of the pool that the 2D layer does not do: `(B·D, ...)` -> `(B·D', ...)`."""
        if self.depth.kernel == self.depth.stride == 1:
            return x
        volume = split_depth(x, self.fold.batch, self.multiplicity)
        volume = pad_depth(volume, *self.depth_padding(volume.shape[2]), "replicate")
        out = self.combine(depth_windows(volume, self.depth))
        return merge_depth(out, self.fold.batch, self.multiplicity)


def depth_windows(volume: Tensor, depth: DepthLayer) -> list[Tensor]:
    """The taps of every window along depth of a padded `(B, C, D, H, W)`, each `(B, C, D', H, W)`."""
    reach = (depth.kernel - 1) * depth.dilation
    if depth.padding == "valid":  # a clip may be shorter than the window
        reach = min(reach, volume.shape[2] - 1)
    end = volume.shape[2] - reach
    return [volume[:, :, tap : end + tap : depth.stride] for tap in range(0, reach + 1, depth.dilation)]


@register_rule(nn.MaxPool2d)
class MaxPoolRule(PoolRule):
    """Max-pool: a maximum over space is the maximum over depth of the maxima in-plane.

    In training one 3D pool does both where the result is equal: the backward pass of a chain of maxima takes
    seven times as long (in channels-last memory). Without gradients the two halves are faster.
    """

    kind: ClassVar[Kind] = "max_pool"

    def forward(self, x: Tensor) -> Any:
        """`(B·D, C, H, W)` -> `(B·D', C, H', W')`, and their indices if the layer returns them."""
        if torch.compiler.is_compiling():  # sizes may be symbolic, so padding cannot be chosen
            return super().forward(x)
        if self.layer.return_indices:
            return super().forward(x)
        trained = self.depth.kernel > 1 and x.requires_grad and torch.is_grad_enabled()
        options = self._options_3d(x.shape) if trained else None
        if options is not None:
            volume = split_depth(x, self.fold.batch, self.multiplicity)
            out = F.max_pool3d(volume, (self.depth.kernel, *self.kernel_2d), **options)
            # Autocast pools in float32, but a maximum of bf16 is bf16: convert once, not per branch.
            return merge_depth(out.to(x.dtype), self.fold.batch, self.multiplicity)
        if self.same and self.dilation_2d == (1, 1):
            with self.fold.quiet():
                x = F.max_pool2d(
                    x, self.kernel_2d, self.stride_2d, self._padding_2d(x.shape), self.dilation_2d, True
                )
            return self.along_depth(x)
        return super().forward(x)

    def _padding_2d(self, folded: torch.Size) -> tuple[int, int]:
        """Leading in-plane padding; with TensorFlow's "same", windows may cross the end (ceil mode)."""
        if not self.same:
            return to_pair(self.layer.padding)  # type: ignore[arg-type]
        axes = zip(folded[2:], self.kernel_2d, self.stride_2d, self.dilation_2d, strict=True)
        height, width = (get_same_padding(*axis) // 2 for axis in axes)
        return height, width

    def _options_3d(self, folded: torch.Size) -> dict[str, Any] | None:
        """Options of the 3D pool that equals both halves on a folded tensor of this shape, or None.

        A pool pads with -inf, so repeated slices beyond the end are windows that reach over it (ceil mode).
        """
        slices = folded[0] // (self.fold.batch * self.multiplicity)
        leading, _ = self.depth_padding(slices)
        ceil_mode = self.same or bool(self.layer.ceil_mode)
        reach = (self.depth.kernel - 1) * self.depth.dilation + 1
        steps = slices + 2 * leading - reach
        steps = -(-steps // self.depth.stride) if ceil_mode else steps // self.depth.stride
        if self.depth.padding == "valid" or steps + 1 != -(-slices // self.depth.stride):
            return None
        if leading > self.depth.kernel // 2 or (self.same and self.dilation_2d != (1, 1)):
            return None  # more padding than a pool allows
        return {
            "stride": (self.depth.stride, *self.stride_2d),
            "padding": (leading, *self._padding_2d(folded)),
            "dilation": (self.depth.dilation, *self.dilation_2d),
            "ceil_mode": ceil_mode,
        }

    def along_depth(self, x: Any) -> Any:
        """Like every pool; in-plane indices, if the layer returns them, are those of the winning slice."""
        if isinstance(x, Tensor):
            return super().along_depth(x)
        if self.depth.kernel == self.depth.stride == 1:
            return x
        values, places = (self._windows(part) for part in x)
        found, tap = torch.stack(values).max(dim=0)
        chosen = torch.stack(places).gather(0, tap.unsqueeze(0)).squeeze(0)
        return tuple(merge_depth(part, self.fold.batch, self.multiplicity) for part in (found, chosen))

    def _windows(self, x: Tensor) -> list[Tensor]:
        volume = split_depth(x, self.fold.batch, self.multiplicity)
        return depth_windows(pad_depth(volume, *self.depth_padding(volume.shape[2]), "replicate"), self.depth)

    @staticmethod
    def combine(windows: list[Tensor]) -> Tensor:
        """Maximum over the taps."""
        out = windows[0]
        for window in windows[1:]:
            out = torch.maximum(out, window)
        return out


@register_rule(nn.AvgPool2d)
class AvgPoolRule(PoolRule):
    """Average pool: a mean over space is the mean over depth of the means in-plane."""

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
