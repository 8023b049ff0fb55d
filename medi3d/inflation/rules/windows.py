"""The rule for windows of a Swin transformer that reach over several slices, as in Video Swin."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.inflation.fold import Fold
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.adopted import AdoptedRule
from medi3d.inflation.rules.base import Geometry, Kind, Rule, adopt, register_attention_rule

torchvision_shim.install()  # before timm, which imports torchvision
from timm.models.swin_transformer import WindowAttention  # noqa: E402


@register_attention_rule("windows")
class WindowRule(AdoptedRule):
    """Attention among the tokens of a window over `depth.kernel` slices (Liu et al. 2022, arXiv:2106.13230).

    The table of relative positions is copied for each of the 2·Dw − 1 offsets along depth (sec. 4.1, as
    their code inflates it), so that on equal slices each key occurs Dw times with the same weight, and
    the softmax over the copies sums back: exact. Blocks that shift their windows in-plane shift them by
    half a window along depth too. A volume thinner than a window is one window. Where the last window
    lacks slices, and where the shift joins both ends of the volume, a mask separates slices of
    different groups.
    """

    kind: ClassVar[Kind] = "attention"
    relative_position_bias_table: nn.Parameter
    shift: int
    """Slices by which windows are shifted along depth."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Windows of Swin (first version), which have a table of relative positions."""
        return isinstance(layer, WindowAttention)

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """One pixel: windows do not move with a voxel, so they are not its receptive field in-plane."""
        return (1, 1), (1, 1), (1, 1)

    @classmethod
    def of(
        cls, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> Rule:
        """Adopt the layer and copy its table for every offset along depth."""
        table: Any = layer.relative_position_bias_table
        inflated = table.detach().repeat(2 * depth.kernel - 1, 1)
        layer.relative_position_bias_table = nn.Parameter(inflated, table.requires_grad)
        layer.fused_attn = True  # type: ignore[assignment]
        return super().of(layer, depth, fold, profile, channels)

    def settle(self, network: nn.Module, path: str) -> None:
        """Shift along depth where the block shifts in-plane, and make the block count slices."""
        block: Any = network.get_submodule(path.rpartition(".")[0])
        self.shift = self.depth.kernel // 2 if any(block.target_shift_size) else 0
        adopt(block, _CountingBlock)

    @property
    def learnt(self) -> bool:
        """Whether the table's copies differ, so that no 2D table equals them."""
        table: Any = self.relative_position_bias_table
        copies = table.unflatten(0, (2 * self.depth.kernel - 1, -1))
        return not bool((copies == copies[0]).all())

    def flat_state(self) -> dict[str, Tensor]:
        """The table of the 2D layer: the mean of the copies."""
        return {"relative_position_bias_table": self._copies().detach().double().mean(dim=0)}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Like the wrapped layer, `(B·D·q, N, C)`: q windows of N tokens per slice; `mask` is `(q, N, N)`."""
        slices = self.fold.call.slices
        x = x.unflatten(0, (self.fold.batch, slices, -1))  # (B, D, q, N, C)
        width, shift = self._window(), self.shift if slices > self.depth.kernel else 0
        missing = -slices % width
        x = F.pad(x, (0, 0) * 3 + (0, missing)).roll(-shift, dims=1)
        x = x.unflatten(1, (-1, width)).transpose(2, 3)  # (B, windows, q, width, N, C)
        shape = x.shape
        if mask is not None or missing or shift:
            mask = self._mask(mask, shape, missing, shift)
        x = super().forward(x.flatten(3, 4).flatten(0, 2), mask)  # type: ignore[misc]
        x = x.view(*shape[:5], -1).transpose(2, 3).flatten(1, 2)
        return x.roll(shift, dims=1)[:, :slices].flatten(0, 2)

    def _window(self) -> int:
        """Slices per window; a thinner volume is one window."""
        return min(self.depth.kernel, self.fold.call.slices)

    def _mask(self, in_plane: Tensor | None, shape: torch.Size, missing: int, shift: int) -> Tensor:
        """`(windows·q, width·N, width·N)`: minus infinity between slices of different groups."""
        windows, q, width, tokens = shape[1:5]
        table = self.relative_position_bias_table
        position = (torch.arange(windows * width, device=table.device) + shift) % (windows * width)
        missing_slice = position >= windows * width - missing
        group = torch.where(missing_slice, 2, (position < shift).long()).view(windows, width)
        apart = group[:, :, None] != group[:, None, :]
        mask = table.new_zeros(apart.shape).masked_fill(apart, float("-inf"))
        mask = mask.view(windows, 1, width, 1, width, 1)
        if in_plane is not None:
            mask = mask + in_plane.view(q, 1, tokens, 1, tokens)
        return mask.expand(-1, q, -1, tokens, -1, tokens).reshape(windows * q, width * tokens, -1)

    def _copies(self) -> Tensor:
        """`(2·Dw − 1, positions in-plane, heads)`"""
        return self.relative_position_bias_table.unflatten(0, (2 * self.depth.kernel - 1, -1))

    def _get_rel_pos_bias(self) -> Tensor:
        """`(1, heads, width·N, width·N)`; called by the layer's own forward."""
        in_plane: Any = self.relative_position_index  # (N, N)
        here = torch.arange(self._window(), device=in_plane.device)
        offset = here[:, None] - here[None, :] + self.depth.kernel - 1  # (width, width)
        bias = self._copies()[offset[:, None, :, None], in_plane[None, :, None, :]]
        return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1).unsqueeze(0)


class _CountingBlock(nn.Module):
    """A Swin block that passes the number of slices to its attention, because windows hide it."""

    def forward(self, x: Tensor) -> Tensor:
        """Like the wrapped block, on `(B·D, H, W, C)`."""
        fold: Fold = self.attn.fold  # type: ignore[assignment,union-attr]
        with fold.counting(x.shape[0] // fold.batch):
            return super().forward(x)
