"""Random changes of training samples with TorchIO (Pérez-García et al., 2021).

TorchIO has (C, W, H, D) where medi3d has (C, D, H, W): axes are permuted here, as views, and
nowhere else. Everything random comes from torch's global RNG.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from medi3d.errors import ConfigError

Sample = Mapping[str, Any]
Group = list[tuple[float, Any, dict[str, Any]]]  # probability, TorchIO class, its keywords
FLIP_AXES = {"left-right": "LR", "anterior-posterior": "AP", "inferior-superior": "IS"}
"""medi3d's names for the axes -> TorchIO's."""

PROBABILITIES = ("affine", "elastic", "flip", "bias_field", "gamma", "blur", "noise")


@dataclass(frozen=True)
class AugmentationSettings:
    """Random changes of a training sample, their probability and size (config section).

    Probabilities are per sample; 0 switches a change off. Intensities are assumed to be normalised:
    `noise_std` is in units of the normalised image.

    Attributes:
        affine: Probability of a rotation and scaling in mm about the patch's centre.
        rotation: Largest angle about each axis, in degrees.
        scale: Largest change of size along each axis, as a fraction: 0.1 is 0.9 to 1.1.
        in_plane: Rotate, scale and deform only within the slices, for thick slices: a rotation out of plane
            would interpolate between distant slices.
        elastic: Probability of an elastic deformation (the most expensive change).
        displacement: Largest shift of a control point in mm, on a grid of 7 x 7 x 7.
        flip: Probability of a mirroring along each of `flip_axes`.
        flip_axes: Of left-right, anterior-posterior, inferior-superior. None by default: bodies are
            not symmetric. Labels of left and right organs are swapped (`data.symmetric`).
        bias_field: Probability of a smooth change of brightness, as MR coils cause.
        bias_magnitude: Largest coefficient of its polynomial of third order.
        gamma: Probability of a gamma correction, on intensities scaled to [0, 1].
        log_gamma: Largest logarithm of the exponent: 0.3 is 0.74 to 1.35.
        blur: Probability of a Gaussian blur.
        blur_std: Its largest deviation in mm.
        noise: Probability of Gaussian noise.
        noise_std: Its largest deviation.
    """

    affine: float = 0.5
    rotation: float = 15.0
    scale: float = 0.15
    in_plane: bool = False
    elastic: float = 0.0
    displacement: float = 3.0
    flip: float = 0.5
    flip_axes: list[str] = field(default_factory=list)
    bias_field: float = 0.0
    bias_magnitude: float = 0.3
    gamma: float = 0.3
    log_gamma: float = 0.3
    blur: float = 0.0
    blur_std: float = 1.0
    noise: float = 0.15
    noise_std: float = 0.1

    def __post_init__(self) -> None:
        for key in PROBABILITIES:
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"augmentation.{key} is {getattr(self, key)}: a probability, 0 to 1")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and value < 0:
                raise ConfigError(f"augmentation.{entry.name} is {value}: 0 or more")
        if not self.scale < 1:
            raise ConfigError(f"augmentation.scale is {self.scale}: a part below 1 (0.1 is 0.9 to 1.1)")
        unknown = [axis for axis in self.flip_axes if axis not in FLIP_AXES]
        if unknown:
            raise ConfigError(f"augmentation.flip_axes has {unknown[0]!r}: {', '.join(FLIP_AXES)}")


def build_augmentation(
    settings: AugmentationSettings, swaps: Sequence[tuple[int, int]] = ()
) -> Callable[[Sample], dict[str, Any]]:
    """A function from a sample to a changed one.

    `swaps` are pairs of labels to swap when left and right are mirrored.

    It takes "image" (C, D, H, W) float32, "label" (1, D, H, W) uint8 if there is one, and
    "spacing", (depth, height, width) in mm (1 mm if absent), and does not change its input.
    """
    return _Augmentation(settings, swaps)


class _Augmentation:
    """Holds the transforms; a class, so that worker processes can receive it."""

    def __init__(self, settings: AugmentationSettings, swaps: Sequence[tuple[int, int]]) -> None:
        self.spatial, self.contrast, self.texture = _transforms(settings)
        self.flip_axes = settings.flip_axes if settings.flip > 0 else []
        self.flip, self.swaps = settings.flip, swaps

    def __call__(self, sample: Sample) -> dict[str, Any]:
        flipped = [axis for axis in self.flip_axes if float(torch.rand(())) < self.flip]
        subject = _flip(to_torchio(sample), flipped, self.swaps)
        chosen = [transform for probability, transform in self.spatial if float(torch.rand(())) < probability]
        if chosen:
            values = _one_hot(subject)
            for transform in chosen:
                subject = transform(subject)
            _arg_max(subject, values)
        subject = _on_unit_range(subject, self.contrast)
        for transform in self.texture:
            subject = transform(subject)
        changed = {**sample, "image": turn(subject["image"].data).contiguous()}
        if "label" in sample:
            changed["label"] = turn(subject["label"].data).to(sample["label"].dtype).contiguous()
        return changed


def _transforms(settings: AugmentationSettings) -> tuple[list[tuple[float, Any]], list[Any], list[Any]]:
    """Transforms of space, each with its probability, of contrast (for images in [0, 1]) and of texture.

    Those of space need label maps, so it must be known beforehand whether one of them applies.
    """
    import torchio as tio

    # No copies and no history: the samples are ours, and both cost more than most transforms.
    bare = {"copy": False, "parse_input": False}
    labels = {"label_interpolation": "linear"}  # of their one-hot maps
    turn, grow, shift = settings.rotation, settings.scale, settings.displacement
    scales, degrees, displacement = (grow,) * 3, (turn,) * 3, (shift,) * 3  # TorchIO's axes: W, H, D
    if settings.in_plane:
        scales, degrees, displacement = (grow, grow, 0.0), (0.0, 0.0, turn), (shift, shift, 0.0)
    spatial: Group = [
        # Padded with the mean of the border: no scan has black corners.
        (
            settings.affine,
            tio.RandomAffine,
            {"scales": scales, "degrees": degrees, "default_pad_value": "mean", **labels},
        ),
        (
            settings.elastic,
            tio.RandomElasticDeformation,
            {"max_displacement": displacement, **labels},
        ),
    ]
    contrast: Group = [
        (settings.bias_field, tio.RandomBiasField, {"coefficients": settings.bias_magnitude}),
        (settings.gamma, tio.RandomGamma, {"log_gamma": settings.log_gamma}),
    ]
    texture: Group = [
        (settings.blur, tio.RandomBlur, {"std": settings.blur_std}),
        (settings.noise, tio.RandomNoise, {"std": settings.noise_std}),
    ]

    def build(group: Group) -> list[Any]:
        return [kind(p=p, **keywords, **bare) for p, kind, keywords in group if p > 0]

    turning = [(p, kind(p=1, **keywords, **bare)) for p, kind, keywords in spatial if p > 0]
    return turning, build(contrast), build(texture)


def to_torchio(sample: Sample) -> Any:
    """A TorchIO subject with a sample's "image", "label" or both; "spacing" in mm, (D, H, W)."""
    import torchio as tio

    depth, height, width = (float(side) for side in sample.get("spacing", (1, 1, 1)))
    # medi3d's arrays run to left and posterior; TorchIO's world is RAS. This makes its axis names right.
    affine = np.diag([-width, -height, depth, 1.0])
    images: dict[str, Any] = {}
    if "image" in sample:
        images["image"] = tio.ScalarImage(tensor=turn(sample["image"]), affine=affine)
    if "label" in sample:
        images["label"] = tio.LabelMap(tensor=turn(sample["label"]), affine=affine)
    return tio.Subject(images)


def _flip(subject: Any, axes: Sequence[str], swaps: Sequence[tuple[int, int]]) -> Any:
    """Mirror along the named axes; a left organ then lies on the right, and is relabelled."""
    import torchio as tio

    if not axes:
        return subject
    subject = tio.Flip(tuple(FLIP_AXES[axis] for axis in axes), copy=False, parse_input=False)(subject)
    if "label" in subject and "left-right" in axes:
        label = subject["label"].data
        swapped = label.clone()
        for one, other in swaps:
            swapped[label == one], swapped[label == other] = other, one
        subject["label"].set_data(swapped)
    return subject


def _one_hot(subject: Any) -> list[int]:
    """A map for each label that is present, for linear interpolation; and these labels, background first.

    With nearest-neighbour rotation, a label drifts from its image: on Hippocampus their Dice is 0.966.
    """
    if "label" not in subject:
        return []
    label = subject["label"].data
    values = [0, *(value for value in label.unique().tolist() if value)]
    subject["label"].set_data((label == torch.tensor(values)[:, None, None, None]).float())
    return values


def _arg_max(subject: Any, values: Sequence[int]) -> None:
    """Join the maps into one; beyond the border all maps are 0, which is background.

    Map after map: `argmax` over the first axis took two thirds of the time of a sample.
    """
    if "label" in subject:
        maps = subject["label"].data
        highest, label = maps[0], torch.zeros(maps.shape[1:], dtype=torch.uint8)
        for value, share in zip(values[1:], maps[1:], strict=True):
            label = torch.where(share > highest, value, label)
            highest = torch.maximum(highest, share)
        subject["label"].set_data(label[None])


def turn(tensor: torch.Tensor) -> torch.Tensor:
    """(C, D, H, W) to (C, W, H, D), or back."""
    return tensor.permute(0, 3, 2, 1)


def _on_unit_range(subject: Any, transforms: list[Any]) -> Any:
    """Apply gamma and bias field to intensities in [0, 1]: a scanner's values are never negative.

    On [-1, 1] TorchIO's gamma would bend the contrast at 0, in the middle of the tissue, and a
    bias field would brighten what is above 0 and darken what is below.
    """
    if not transforms:
        return subject
    image = subject["image"]
    axes = (1, 2, 3)
    low = image.data.amin(axes, keepdim=True)
    extent = (image.data.amax(axes, keepdim=True) - low).clamp_min(1e-6)
    image.set_data((image.data - low) / extent)
    for transform in transforms:
        subject = transform(subject)
    image = subject["image"]
    image.set_data(image.data * extent + low)
    return subject
