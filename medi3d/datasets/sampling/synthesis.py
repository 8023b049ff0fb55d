"""Draw images from label maps: each label gets a random intensity, so networks learn no fixed contrast.

After SynthSeg (Billot et al. 2023, doi:10.1016/j.media.2023.102789): the map is moved, each label drawn from
its own Gaussian (TorchIO's `RandomLabelsToImage`), then blur, bias field and gamma make it look like a scan.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medi3d.datasets.images.preprocessing import normalise
from medi3d.datasets.images.settings import Normalisation
from medi3d.datasets.sampling.augmentation import AugmentationSettings, build_augmentation, to_torchio, turn

MEAN, DEVIATION = (0.1, 0.9), (0.01, 0.1)
"""Ranges of a label's mean intensity and of its deviation, for intensities in [0, 1]."""


def build_synthesis(settings: AugmentationSettings) -> Callable[[Mapping[str, Any]], tuple[Tensor, Tensor]]:
    """A function from a label map to an image of it.

    It takes a sample with "label" `(1, D, H, W)` uint8, any values, and "spacing" in mm, and returns the
    image `(1, D, H, W)` float32 in [-1, 1] and the transformed map, of the same shape, uint8. The rotation,
    scaling, bias field, gamma, blur and noise of `settings` are used; labels are resampled by nearest
    neighbour before the image is drawn, so image and map agree exactly.
    """
    return _Synthesis(settings)


class _Synthesis:
    """Holds the transforms; a class, so that worker processes can receive it."""

    def __init__(self, settings: AugmentationSettings) -> None:
        import torchio as tio

        bare: dict[str, Any] = {"copy": False, "parse_input": False}
        self.move = tio.RandomAffine(
            p=settings.affine, scales=settings.scale, degrees=settings.rotation, **bare
        )
        self.draw = tio.RandomLabelsToImage(
            label_key="label", image_key="image", default_mean=MEAN, default_std=DEVIATION, **bare
        )
        still = replace(settings, affine=0.0, elastic=0.0, flip_axes=[])
        self.change = build_augmentation(still)
        self.normalisation = Normalisation()

    def __call__(self, sample: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        subject = to_torchio({"label": sample["label"], "spacing": sample["spacing"]})
        subject = self.draw(self.move(subject))
        drawn = turn(subject["image"].data).contiguous()
        changed = self.change({"image": drawn, "spacing": sample["spacing"]})["image"]
        image = torch.from_numpy(np.stack([normalise(part.numpy(), self.normalisation) for part in changed]))
        return image, turn(subject["label"].data).to(torch.uint8).contiguous()
