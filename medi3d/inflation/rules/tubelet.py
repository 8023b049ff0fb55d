"""The rule for patchify stems whose networks must not meet a depth stride later."""

import torch.nn.functional as F
from torch import Tensor, nn

from medi3d.errors import SourceError
from medi3d.inflation.fold import Fold
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules.convolution import ConvRule


class TubeletRule(ConvRule):
    """A patchify convolution that takes its slices as channels (tubelets: Arnab et al. 2021, ViViT).

    Many vision transformers read the batch size before their patch embedding and use it after; a
    stride along depth inside would change it behind their back. So the fold groups r slices into
    channels at the entry, and this convolution with its r taps is exactly the 3D one of kernel and
    stride (r, k, k): the batch it sees is B·D/r from the first line on.
    """

    def __init__(
        self, layer: nn.Conv2d, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> None:
        if self.geometry_of(layer)[0] != self.geometry_of(layer)[1] or layer.groups != 1:
            raise SourceError("the depth stride can be moved to the entry only where patches do not overlap")
        super().__init__(layer, depth, fold, profile, channels)
        fold.tubelet = depth.stride

    def forward(self, x: Tensor) -> Tensor:
        """`(B·D/r, C·r, H, W)` -> `(B·D/r, O, H', W')`."""
        x, padding = self._pad_in_plane(x)
        if self.along_depth is not None:  # each slice alone, then the r slices of a tubelet
            x = x.unflatten(1, (-1, self.depth.stride)).transpose(1, 2).flatten(0, 1)
        weight = self.kernel().flatten(1, 2)
        out = F.conv2d(x, weight, self.bias, self.stride_2d, padding, self.dilation_2d)
        if self.along_depth is None:
            return out
        tubelets = out.unflatten(0, (-1, self.depth.stride)).transpose(1, 2)  # (B·D/r, O, r, H', W')
        return self.along_depth(tubelets, self.depth).squeeze(2)
