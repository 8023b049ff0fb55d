"""The filters of a network's first layer over time, as in Figure 4 of the I3D paper."""

from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from medi3d.reports.plots import save_figure

SHOWN = 64
COLUMNS = 4
LINE, GAP = 1, 4
"""White pixels between the slices of a filter, and between filters in a row."""


def first_kernel(network: Any) -> Tensor:
    """Weights `(out, in, D, H, W)` of the encoder's first layer that has a kernel."""
    weights = (p for p in network.encoder.parameters() if p.dim() in (4, 5) and max(p.shape[2:]) > 1)
    kernel = next(weights).detach().float().cpu()
    return kernel if kernel.dim() == 5 else kernel[:, :, None]


def plot_filters_over_time(before: Tensor, after: Tensor, path: Path) -> Path:
    """The first 64 filters `(out, in, T, H, W)`: summed over time, before and after training.

    Time runs from left to right; each filter has its own scale; three channels are shown as RGB.
    """
    panels = {
        "2D": before.sum(dim=2, keepdim=True),
        "before training": before,
        "after training": after,
    }
    pictures = {title: mosaic(kernel) for title, kernel in panels.items()}
    widths = [picture.shape[1] for picture in pictures.values()]
    height = next(iter(pictures.values())).shape[0]
    figure = Figure(figsize=(12, 1 + 12 * height / sum(widths)), layout="constrained")
    grid = figure.subplots(1, len(pictures), width_ratios=widths)
    for axes, (title, picture) in zip(grid, pictures.items(), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set(title=title, xticks=[], yticks=[])
    return save_figure(figure, path)


def mosaic(kernel: Tensor) -> np.ndarray:
    """Filters `(out, in, T, h, w)` -> picture `(rows, columns, 3)` in [0, 1], four filters in a row."""
    kernel = kernel[:SHOWN]
    if kernel.shape[1] != 3:
        kernel = kernel.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1, -1)
    low, high = (getattr(kernel.flatten(1), name)(dim=1).view(-1, 1, 1, 1, 1) for name in ("amin", "amax"))
    tiles = F.pad((kernel - low) / (high - low).clamp_min(1e-12), (0, LINE, 0, LINE), value=1.0)
    rows = tiles.permute(0, 3, 2, 4, 1).flatten(2, 3)  # (out, h, T·w, 3)
    rows = F.pad(rows, (0, 0, 0, GAP), value=1.0)
    rows = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, -len(rows) % COLUMNS), value=1.0)
    return rows.unflatten(0, (-1, COLUMNS)).transpose(1, 2).flatten(2, 3).flatten(0, 1).numpy()
