"""Replace or freeze a network's norm layers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medi3d.inflation.fold import Fold, merge_depth, split_depth
from medi3d.inflation.network import Inflated

GROUPS = 8


class VolumeNorm(nn.Module):
    """Instance or group norm in place of a batch norm, over depth, height and width of each volume.

    It takes over scale and shift (and timm's dropout and activation), and has no running statistics.

    Args:
        layer: the batch norm.
        groups: number of groups of channels normalised together; one per channel is instance norm.
        fold: fold of an inflated network, whose layers see tensors `(B·D, C, H, W)`; None for 5-D ones.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layer: _BatchNorm, groups: int, fold: Fold | None) -> None:
        super().__init__()
        self.groups, self.eps, self.fold = groups, layer.eps, fold
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        self.drop = getattr(layer, "drop", nn.Identity())
        self.act = getattr(layer, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a tensor of the batch norm's input shape; the shape stays."""
        return self.act(self.drop(self._norm(x, self.weight, self.bias)))

    def normalise(self, x: Tensor) -> Tensor:
        """The norm alone, without scale and shift."""
        return self._norm(x, None, None)

    def _norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None and bias is not None:  # as I3D's; torch cannot differentiate that
            weight = torch.ones_like(bias)
        if self.fold is None:
            return F.group_norm(x, self.groups, weight, bias, self.eps)
        volume = split_depth(x, self.fold.batch)
        return merge_depth(F.group_norm(volume, self.groups, weight, bias, self.eps), self.fold.batch)

    def extra_repr(self) -> str:
        """Number of groups, for `print(network)`."""
        return f"groups={self.groups}"


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch norm with running statistics, by its path."""
    return {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    }


def convert_norms(encoder: nn.Module, norm: str) -> nn.Module:
    """Replace every batch norm by instance or group norm, in place, and return the encoder.

    Args:
        encoder: an inflated or natively 3D encoder.
        norm: "instance" or "group" (of channels in 8 groups, or fewer where they do not divide).
    """
    fold = encoder.fold if isinstance(encoder, Inflated) else None
    for path, layer in batch_norms(encoder).items():
        groups = layer.num_features if norm == "instance" else math.gcd(layer.num_features, GROUPS)
        parent, _, name = path.rpartition(".")
        setattr(encoder.get_submodule(parent), name, VolumeNorm(layer, groups, fold))
    return encoder


def freeze_norms(encoder: nn.Module) -> list[nn.Module]:
    """Turn off gradients of the batch norms and return them; in evaluation mode they do not change."""
    layers = list(batch_norms(encoder).values())
    for layer in layers:
        layer.requires_grad_(False)
    return list(layers)
