"""A trained network or an ensemble, and its mask of a scan on the scan's own grid."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from medi3d.datasets.clips.settings import ClipSettings
from medi3d.datasets.images.preprocessing import LoadedImage
from medi3d.datasets.images.resampling import oriented_grid, restored_slabs, turned_like
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.engine import distributed
from medi3d.engine.inference import Inferer, Network, mirrored, placed, predict, predict_labels, slabs_of
from medi3d.engine.precision import Precision, evaluating
from medi3d.engine.settings import PredictionSettings
from medi3d.engine.state import fill_network, read_checkpoint
from medi3d.engine.task import Task
from medi3d.errors import ConfigError, DataError
from medi3d.experiment.run import Run, plan_file
from medi3d.experiment.tasks import build_network, build_task
from medi3d.files import file_sha256
from medi3d.prediction.postprocessing import keep_largest, read_largest

CONFIDENCE_STEPS = 255
"""Confidences are stored in one byte per voxel: a resolution of 0.4 %."""


@dataclass(frozen=True)
class Predictor:
    """A trained network, ready to predict cases.

    Attributes:
        data: how its scans or clips are read.
        network: on its device.
        inferer: how a whole case is predicted.
        precision: arithmetic and memory format.
        prediction: mirrored copies, tolerance of the surface Dice.
        largest: numbers of the labels that keep only their largest component.
        identity: differs between predictors that may predict differently.
        name: of the run or bundle, for messages.
    """

    data: VolumeSettings | ClipSettings
    network: nn.Module
    inferer: Inferer
    precision: Precision
    prediction: PredictionSettings = field(default_factory=PredictionSettings)
    largest: Sequence[int] = ()
    identity: str = ""
    name: str = ""

    @classmethod
    def load(cls, run: Run, decided: Run | None = None) -> "Predictor":
        """The best network of a run.

        Args:
            run: a single training.
            decided: the run that says which labels keep only their largest component; None: `run`.

        Raises:
            WeightsError: the run has no complete checkpoint, or it is of another network.
        """
        task = build_task(run.experiment)
        content = read_checkpoint(run.best)
        network = build_network(run.experiment, task, pretrained=False, proof=False, checkpoint=content)
        fill_network(network, content, run.best)
        largest = read_largest((decided or run).largest)
        plan = plan_file(run.experiment)
        weights = file_sha256(run.best) + (file_sha256(plan) if plan else "")
        return cls.of(run.experiment, task, network, weights, largest, str(run.folder))

    @classmethod
    def of(
        cls,
        experiment: Any,
        task: Task,
        network: nn.Module,
        weights: str,
        largest: Collection[str],
        name: str,
    ) -> "Predictor":
        """A predictor for a network with loaded weights.

        Args:
            experiment: how it was trained.
            task: from `build_task`.
            network: with its weights.
            weights: SHA-256 of the files that define its function: weights, plan.
            largest: names of the labels that keep only their largest component.
            name: of the run or bundle, for messages.
        """
        precision = Precision.choose(experiment.training.precision, distributed.local_device())
        network = precision.place_network(network).eval()
        numbers = [number for number, label in enumerate(task.classes) if label in largest]
        data, prediction = experiment.data, experiment.prediction
        identity = f"{weights} {(data, prediction, numbers, str(precision))}"
        return cls(data, network, task.inferer, precision, prediction, numbers, identity, name)

    @property
    def volumes(self) -> VolumeSettings:
        """How its scans are read.

        Raises:
            ConfigError: it does not segment.
        """
        if not isinstance(self.data, VolumeSettings):
            raise ConfigError(f"{self.name}: is a network for clips, where a segmentation is needed")
        return self.data

    @property
    def windowed(self) -> Network:
        """The network that predicts windows: on its device, in its precision, mirrored."""
        swaps = self.data.swaps if isinstance(self.data, VolumeSettings) else ()
        return mirrored(placed(self.network, self.precision), self.prediction.mirror, swaps)

    def logits(self, image: Tensor) -> Tensor:
        """Logits `(classes, ...)` of one image or clip `(C, D, H, W)`."""
        return predict(image, self.network, self.inferer, self.precision)

    def label_map(self, image: LoadedImage) -> np.ndarray:
        """Predicted label map `(D, H, W)` on the network's grid, that of `image.canonical`."""
        return predict_labels(image.image, self.windowed, self.inferer)

    def probabilities(self, image: LoadedImage, grid: sitk.Image) -> Iterator[Tensor]:
        """Probabilities `(classes, s, H, W)` on the scan's grid turned to LPS, slab by slab."""
        slabs = (slab.softmax(dim=0) for slab in slabs_of(image.image, self.windowed, self.inferer))
        return restored_slabs(slabs, image.canonical, grid)


def load_members(run: Run) -> list[Predictor]:
    """The best network of each member of a run; the run itself decides about largest components for all.

    Raises:
        WeightsError: as `Predictor.load`.
    """
    return [Predictor.load(member, decided=run) for member in run.members]


@dataclass(frozen=True)
class Segmentation:
    """A mask, and for each label 1, 2, ... its voxels and its mean probability there (NaN: no voxel)."""

    mask: sitk.Image
    voxels: list[int]
    confidence: list[float]


@evaluating()
def segment(predictors: Sequence[Predictor], images: Sequence[LoadedImage]) -> Segmentation:
    """The mask by the mean of the probabilities of all predictors.

    Probabilities of all classes exist for a few slices at a time only: each slab is averaged, reduced to its
    most probable class, and freed.

    Args:
        predictors: one, or an ensemble whose classes are the same.
        images: one scan, as each of the predictors takes it.

    Raises:
        DataError: a network gives NaN.
    """
    original = images[0].original
    grid = oriented_grid(original)
    members = [one.probabilities(image, grid) for one, image in zip(predictors, images, strict=True)]
    mask = np.empty(grid.GetSize()[::-1], np.uint8)
    strength = np.empty_like(mask)
    done = classes = 0
    for mean in members[0]:
        if len(members) > 1:
            mean = sum((next(other) for other in members[1:]), mean) / len(members)
        classes, until = len(mean), done + mean.shape[1]
        highest, winner = mean.max(dim=0)
        if bool(highest.isnan().any()):
            raise DataError(
                f"{' and '.join(one.name for one in predictors)}: the network gives NaN for this scan"
            )
        mask[done:until] = winner.to(torch.uint8).cpu().numpy()
        strength[done:until] = (highest * CONFIDENCE_STEPS).round().to(torch.uint8).cpu().numpy()
        done = until
        del mean, highest, winner  # free before the next slab
    # A component is removed only where all members agree.
    keep_largest(mask, set.intersection(*(set(one.largest) for one in predictors)))
    voxels = np.bincount(mask.ravel(), minlength=classes)[1:]
    sums = [float(strength[mask == number].sum(dtype=np.float64)) for number in range(1, classes)]
    confidence = [
        total / count / CONFIDENCE_STEPS if count else float("nan")
        for total, count in zip(sums, voxels, strict=True)
    ]
    image = sitk.GetImageFromArray(mask)
    image.CopyInformation(grid)
    return Segmentation(turned_like(image, original), [int(count) for count in voxels], confidence)


def check_ensemble(predictors: Sequence[Predictor]) -> None:
    """Refuse networks whose answers cannot be averaged.

    Raises:
        ConfigError: one does not segment, or they differ in labels or channels.
    """
    first = predictors[0]
    for key in ("labels", "channels"):
        wanted = getattr(first.volumes, key)
        for other in predictors:
            own = getattr(other.volumes, key)
            if own != wanted:
                raise ConfigError(
                    f"{other.name}: {key} is {own}, in {first.name} {wanted}; an ensemble's must be equal"
                )
