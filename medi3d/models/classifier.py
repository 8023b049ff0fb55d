"""The head that turns an encoder into a classifier of clips or volumes."""

from typing import Any

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Encoder, mean over depth, height and width of its last maps, dropout, linear layer.

    Args:
        encoder: returns a list of maps `(B, C, D, H, W)` and has `out_channels`.
        num_classes: number of classes.
        dropout: share of features dropped before the linear layer.
        maps: number of last maps that are pooled, each over its own extent, and concatenated (SlowFast: 2).
        hidden: width of an extra linear layer with ReLU before the dropout (X3D); None: no such layer.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        *,
        dropout: float = 0.5,
        maps: int = 1,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        declared: Any = encoder  # streams that are fused declare channels alone
        self.encoder, self.maps = encoder, maps
        width = sum(declared.out_channels[-maps:])
        wider = [] if hidden is None else [nn.Linear(width, hidden, bias=False), nn.ReLU()]
        self.head = nn.Sequential(*wider, nn.Dropout(dropout), nn.Linear(hidden or width, num_classes))

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> logits `(B, num_classes)`."""
        pooled = [features.mean(dim=(2, 3, 4)) for features in self.encoder(clip)[-self.maps :]]
        return self.head(torch.cat(pooled, dim=1))
