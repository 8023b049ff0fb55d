"""Training samples of a pretraining on unlabelled volumes."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from medi3d.datasets.cohorts.cohort import read_cohort
from medi3d.datasets.cohorts.splits import split_cases
from medi3d.datasets.cohorts.unlabelled import UnlabelledCohort, Volume, list_volumes, load_map, load_volume
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.datasets.sampling.augmentation import build_augmentation
from medi3d.datasets.sampling.corruption import (
    bend_intensities,
    mask_cubes,
    paint_in,
    paint_out,
    shuffle_locally,
)
from medi3d.datasets.sampling.patches import cut_patch
from medi3d.datasets.sampling.stream import Sample, seeded
from medi3d.datasets.sampling.synthesis import build_synthesis
from medi3d.engine.pretext import PretextSettings, group_numbers
from medi3d.errors import ConfigError, first_line
from medi3d.experiment.settings import PretrainingExperiment


class PretextSamples:
    """The samples of a pretraining: which volumes, what is read, and how it is changed.

    Raises:
        ConfigError: a cohort's `exclude_validation_of` is not a config of that cohort.
        DataError: a cohort is missing or empty.
    """

    def __init__(self, experiment: PretrainingExperiment) -> None:
        self.settings, self.pretext = experiment.data, experiment.pretext
        self.channels, self.seed = experiment.network.in_channels, experiment.seed
        self.maps = self.pretext.kind == "synthetic"
        if self.maps and self.channels != 1:
            raise ConfigError(f"network.in_channels is {self.channels}: images of label maps have 1 channel")
        self.synthesise = build_synthesis(experiment.augmentation)
        self.augment = build_augmentation(experiment.augmentation)

    def split(self) -> tuple[list[Volume], list[Volume]]:
        """Training volumes, repeated as the cohorts ask, and validation volumes."""
        cohorts = dict(enumerate(self.settings.cohorts))
        excluded = {n: held_out(c) for n, c in cohorts.items() if c.exclude_validation_of}
        volumes = list_volumes(self.settings, channels=self.channels, maps=self.maps, excluded=excluded)
        if self.settings.validation >= len(volumes):
            raise ConfigError(
                f"data.validation is {self.settings.validation}: none of {len(volumes)} volumes is left for "
                "training"
            )
        generator = torch.Generator().manual_seed(self.settings.split_seed)
        order = torch.randperm(len(volumes), generator=generator).tolist()
        held = {volumes[place].name for place in order[: self.settings.validation]}
        training = [volume for volume in volumes if volume.name not in held]
        repeated = [volume for volume in training for _ in range(cohorts[volume.cohort].repeat)]
        return repeated, [volume for volume in volumes if volume.name in held]

    def load(self, volume: Volume) -> Sample:
        """A volume as it is read, without randomness."""
        if self.maps:
            return load_map(volume, self.settings)
        return load_volume(volume, self.settings, self.channels)

    def change(self, sample: Sample) -> Sample:
        """A training sample: "image", the network's input, and "label", its target."""
        patch = self.undamaged(sample)
        if self.maps:
            groups = group_numbers(self.pretext.labels, sample["values"].tolist())
            patch["label"] = torch.tensor(groups, dtype=torch.uint8)[patch["label"].long()]
            return patch
        image, counts = corrupt(patch["image"], self.pretext)
        return {**patch, "image": image, "label": torch.cat([patch["image"], counts])}

    def undamaged(self, sample: Sample) -> Sample:
        """A patch around a random foreground voxel, synthesised or augmented but not damaged."""
        centres = sample["centres"]
        centre = centres[int(torch.randint(len(centres), ()))].tolist()
        patch = cut_patch(sample, self.settings.patch, centre)
        if self.maps:
            image, moved = self.synthesise(patch)
            return {**patch, "image": image, "label": moved}
        return self.augment(patch)

    def whole(self, sample: Sample) -> Sample:
        """Like `change`, but deterministic."""
        with seeded(self.seed, zlib.crc32(str(sample["name"]).encode())):
            return self.change(sample)


def corrupt(clean: Tensor, pretext: PretextSettings) -> tuple[Tensor, Tensor]:
    """The damaged patch `(C, D, H, W)`, and a mask `(1, D, H, W)`: 1 where the loss counts."""
    if pretext.kind == "masked":
        return mask_cubes(clean, pretext.cube, pretext.share)
    image = clean
    for rate, change in ((pretext.shuffle, shuffle_locally), (pretext.bend, bend_intensities)):
        if float(torch.rand(())) < rate:
            image = change(image)
    if float(torch.rand(())) < pretext.paint:
        paint: Callable[[Tensor], Tensor] = paint_in
        if float(torch.rand(())) < pretext.paint_out:
            paint = paint_out
        image = paint(image)
    return image, torch.ones_like(clean[:1])


def held_out(cohort: UnlabelledCohort) -> list[Path]:
    """Image files of the validation cases of the segmentation config that a cohort names.

    Raises:
        ConfigError: it has no section `data` for volumes, or is about another cohort.
    """
    path = Path(str(cohort.exclude_validation_of))
    key = "data.cohorts: exclude_validation_of"
    try:
        given: Any = OmegaConf.load(path)
        data = OmegaConf.merge(OmegaConf.structured(VolumeSettings), given["data"])
        settings: VolumeSettings = OmegaConf.to_object(data)  # type: ignore[assignment]
    except (OSError, KeyError, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{key}: {path} is not a readable segmentation config ({first_line(error)})"
        ) from error
    if Path(settings.root).resolve() != Path(cohort.root).resolve():
        raise ConfigError(f"{key}: {path} is about {settings.root}, not about {cohort.root}")
    cases = read_cohort(settings.root).cases
    _, validation = split_cases(cases, settings)
    return [image for case in validation for image in case.images]
