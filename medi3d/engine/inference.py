"""From an image of any size to a prediction: one forward pass where it fits, else sliding windows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from medi3d.axes import DEPTH, HEIGHT, WIDTH, Triple
from medi3d.engine.precision import Precision

AXES = {"depth": DEPTH, "height": HEIGHT, "width": WIDTH}

Inferer = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""(image `(B, C, D, H, W)`, network) -> logits in float32."""


def single_forward(image: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
    """The network on the image as it is: `(B, C, D, H, W)` -> logits in float32."""
    return network(image).float()


@dataclass(frozen=True)
class SlidingWindow:
    """Logits `(B, classes, D, H, W)` of a volume of any size.

    A volume that fits into the window is seen at once. A larger one is covered by overlapping windows,
    whose logits are averaged with Gaussian weights, as in nnU-Net (Isensee et al. 2021,
    doi:10.1038/s41592-020-01008-z).

    Args:
        size: window in voxels, (D, H, W).
        overlap: share of a window that its neighbour covers too, 0 to 1.
        windows_at_once: windows in one forward pass.
    """

    size: Triple
    overlap: float = 0.5
    windows_at_once: int = 2

    def __call__(self, image: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Image `(B, C, D, H, W)` -> logits `(B, classes, D, H, W)` in float32."""
        if all(extent <= window for extent, window in zip(image.shape[2:], self.size, strict=True)):
            return single_forward(image, network)
        inferer = SlidingWindowInferer(self.size, self.windows_at_once, self.overlap, mode="gaussian")
        logits = inferer(image, lambda windows: single_forward(windows, network))
        return cast(Tensor, logits)  # MONAI's type allows for networks with several outputs


def mirrored(inferer: Inferer, axes: Sequence[str]) -> Inferer:
    """`inferer` averaged over all mirrorings of the named axes, "depth", "height" or "width".

    Mirrored left and right labels change places unseen: name "width" only where no label has a side.
    """
    flips: list[list[int]] = [[]]
    for axis in axes:
        flips += [[*flip, AXES[axis]] for flip in flips]

    def averaged(image: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        views = [inferer(image.flip(flip), network).softmax(dim=1).flip(flip) for flip in flips]
        return torch.stack(views).mean(dim=0).clamp_min(1e-8).log()  # logits, up to a constant

    return averaged if len(flips) > 1 else inferer


@torch.inference_mode()
def predict(image: Tensor, network: nn.Module, inferer: Inferer, precision: Precision) -> Tensor:
    """Logits `(classes, ...)`, on the CPU, of one image `(C, D, H, W)`."""
    network.eval()
    with precision.autocast():
        logits = inferer(precision.place(image[None]), network)
    return logits[0].float().cpu()


def predict_labels(image: Tensor, network: nn.Module, inferer: Inferer, precision: Precision) -> np.ndarray:
    """Label map `(D, H, W)` of uint8: for one volume `(C, D, H, W)`, the class with the highest logit."""
    return predict(image, network, inferer, precision).argmax(dim=0).to(torch.uint8).numpy()
