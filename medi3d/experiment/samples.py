"""Training and validation samples, in one form for volumes and clips, so that one trainer serves both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.progress import track
from torch.utils.data import DataLoader

from medi3d.datasets.clips.clips import (
    evaluation_clip,
    load_frames,
    read_clip_list,
    training_clip,
)
from medi3d.datasets.clips.splits import split_clips
from medi3d.datasets.cohorts.cache import load_cached
from medi3d.datasets.cohorts.cases import load_case
from medi3d.datasets.cohorts.cohort import Case, read_cohort
from medi3d.datasets.cohorts.splits import split_cases
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.datasets.sampling.augmentation import build_augmentation
from medi3d.datasets.sampling.patches import PLACES, labelled_voxels, sample_patch
from medi3d.datasets.sampling.stream import (
    MemoryCache,
    Sample,
    StreamBatches,
    TrainingStream,
    training_loader,
    validation_loader,
)
from medi3d.engine import distributed
from medi3d.engine.log import log, screen
from medi3d.engine.settings import TrainingSettings
from medi3d.errors import DataError
from medi3d.experiment.settings import (
    ClassificationExperiment,
    SegmentationExperiment,
)


@dataclass(frozen=True)
class Data:
    """Where samples come from.

    Attributes:
        training: items to train on.
        validation: items to validate on.
        load: item -> what is read of it, without randomness; cached in memory up to `training.cache_gb`.
        change: what was read -> training sample, random (patch or crop, augmentation).
        whole: what was read -> the whole case, as it is validated.
    """

    training: Sequence[Any]
    validation: Sequence[Any]
    load: Callable[[Any], Sample]
    change: Callable[[Sample], Sample]
    whole: Callable[[Sample], Sample]

    def training_batches(self, start: int, settings: TrainingSettings, seed: int) -> DataLoader:
        """Batches from step `start` on, for this process."""
        load = self._remembering(self.training, settings)
        stream = TrainingStream(self.training, load, self.change, seed)
        place = {"rank": distributed.rank(), "ranks": distributed.ranks()}
        batches = StreamBatches(start, settings.steps, settings.batch_size, **place)
        return training_loader(stream, batches, settings.workers)

    def validation_batches(self, settings: TrainingSettings) -> DataLoader:
        """The validation cases of this process, one per batch."""
        if not self.validation:
            raise DataError("no validation case: set data.validation=1, or name a split in the list of cases")
        mine = self.validation[distributed.rank() :: distributed.ranks()]
        load = self._remembering(mine, settings)
        return validation_loader(mine, lambda item: self.whole(load(item)))

    def _remembering(self, items: Sequence[Any], settings: TrainingSettings) -> Callable[[Any], Sample]:
        # Filled now, so that damaged cases are found at the start and worker processes share the memory.
        if not settings.cache_gb:
            return self.load
        cache = MemoryCache(self.load, settings.cache_gb * 2**30)
        for item in track(items, "reading", console=screen, disable=not screen.is_terminal):
            cache(item)
        return cache


def volume_data(experiment: SegmentationExperiment) -> Data:
    """The samples of a segmentation: patches to train on, whole cases to validate on."""
    settings = experiment.data
    training, validation = split_volumes(settings)
    if validation == training:
        log.warning("data.validation is 0: validated on the training cases, scores only tell the fit")
    augment = build_augmentation(experiment.augmentation, settings.swaps)

    def change(sample: Sample) -> Sample:
        return augment(sample_patch(sample, settings.patch, settings.foreground))

    load = partial(load_cached if settings.cache else _load_with_places, settings=settings)
    return Data(training, validation, load, change, whole=lambda case: case)


def _load_with_places(case: Case, settings: VolumeSettings) -> Sample:
    """Find labelled voxels once, as the cache does; searching for each patch takes a third of its time."""
    sample = load_case(case, settings)
    if settings.foreground and "label" in sample:
        sample["places"] = labelled_voxels(sample["label"], PLACES)
    return sample


def clip_data(experiment: ClassificationExperiment) -> Data:
    """The samples of a classification: clips at a random time and place, or their middle."""
    settings = experiment.data
    training, validation = split_clips(read_clip_list(settings).clips, settings)
    return Data(
        training,
        validation,
        partial(load_frames, settings=settings),
        change=partial(training_clip, settings=settings),
        whole=partial(evaluation_clip, settings=settings),
    )


def split_volumes(settings: VolumeSettings) -> tuple[list[Case], list[Case]]:
    """Training and validation cases of a cohort, all with labels.

    Raises:
        DataError: the cohort is missing or empty, or a case has no label.
    """
    cohort = read_cohort(settings.root)
    training, validation = split_cases(cohort.cases, settings)
    for case in (*training, *validation):
        if not case.label_files:
            raise DataError(f"{settings.root}: case {case.name} has no label; training needs one for each")
    return training, validation
