"""A trained network, or several, and the mask that they make of a scan on its own grid."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from medi3d.datasets.images.preprocessing import LoadedImage
from medi3d.datasets.images.resampling import oriented_grid, restored_slabs, turned_like
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.engine import distributed
from medi3d.engine.inference import Inferer, Network, mirrored, placed, predict, predict_labels, slabs_of
from medi3d.engine.precision import Precision, evaluating
from medi3d.engine.state import load_network
from medi3d.errors import ConfigError
from medi3d.experiment.building import make_network, make_task
from medi3d.experiment.settings import Experiment, SegmentationExperiment, is_crossvalidation
from medi3d.prediction.postprocessing import keep_largest, read_largest

CONFIDENCE_STEPS = 255
"""Confidences are kept in a byte a voxel: to 0.2 %."""


@dataclass(frozen=True)
class Predictor:
    """A trained network with all that it takes to predict a case.

    Attributes:
        experiment: of the run.
        network: on its device.
        inferer: how a whole case is seen.
        precision: that it computes in.
        mirror: axes along which mirrored copies are predicted too.
        largest: numbers of the labels of which only the largest component is kept.
        identity: tells this predictor from any other that predicts otherwise.
    """

    experiment: Experiment
    network: nn.Module
    inferer: Inferer
    precision: Precision
    mirror: Sequence[str] = ()
    largest: Sequence[int] = ()
    identity: str = ""

    @classmethod
    def load(cls, experiment: Experiment, folder: Path, decided: Path | None = None) -> "Predictor":
        """The best network of the run in `folder`.

        Args:
            experiment: of the run.
            folder: the run folder.
            decided: folder that says of which labels the largest component is kept; `folder` if None.

        Raises:
            WeightsError: the run has no complete checkpoint, or it is of another network.
        """
        task = make_task(experiment)
        network = make_network(experiment, task, pretrained=False)
        best = folder / "checkpoints" / "best.pt"
        load_network(best, network)
        precision = Precision.choose(experiment.training.precision, distributed.local_device())
        placed_network = precision.place_network(network).eval()
        names = read_largest(decided or folder)
        largest = [number for number, name in enumerate(task.classes) if name in names]
        with best.open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        data = experiment.data if isinstance(experiment, SegmentationExperiment) else None
        settings = (data, experiment.prediction, largest, str(precision))
        identity = f"{weights} {settings}"
        mirror = experiment.prediction.mirror
        return cls(experiment, placed_network, task.inferer, precision, mirror, largest, identity)

    @property
    def run(self) -> Network:
        """The network as windows are given to it: placed, in its precision, mirrored."""
        data = self.experiment.data if isinstance(self.experiment, SegmentationExperiment) else None
        return mirrored(placed(self.network, self.precision), self.mirror, data.swaps if data else ())

    def logits(self, image: Tensor) -> Tensor:
        """Logits `(classes, ...)` of one image or clip `(C, D, H, W)`."""
        return predict(image, self.network, self.inferer, self.precision)

    def label_map(self, image: LoadedImage) -> np.ndarray:
        """Predicted label map `(D, H, W)` on the network's grid, that of `image.canonical`."""
        return predict_labels(image.image, self.run, self.inferer)

    def probabilities(self, image: LoadedImage, grid: sitk.Image) -> Iterator[Tensor]:
        """Probabilities `(classes, s, H, W)` on the scan's grid turned to LPS, slab after slab."""
        slabs = (slab.softmax(dim=0) for slab in slabs_of(image.image, self.run, self.inferer))
        return restored_slabs(slabs, image.canonical, grid)

    def segment(self, image: LoadedImage) -> sitk.Image:
        """The mask of a loaded scan, on the grid of its file."""
        return segment([self], [image]).mask


def members(experiment: Experiment, folder: Path) -> list[tuple[Experiment, Path]]:
    """The runs in a run folder: itself, or of a cross-validation each fold, in `fold0`, `fold1`, ..."""
    if not is_crossvalidation(experiment):
        return [(experiment, folder)]
    return [
        (
            replace(experiment, name=f"{experiment.name}_fold{k}", data=replace(experiment.data, fold=k)),
            folder / f"fold{k}",
        )
        for k in range(experiment.data.folds)
    ]


def load_members(experiment: Experiment, folder: Path) -> list[Predictor]:
    """The best network of each of the runs in a run folder; the folder decides about components for all.

    Raises:
        WeightsError: as `Predictor.load`.
    """
    return [Predictor.load(*run, decided=folder) for run in members(experiment, folder)]


@dataclass(frozen=True)
class Segmentation:
    """A mask, and for each label 1, 2, ... its voxels and its mean probability there (NaN: no voxel)."""

    mask: sitk.Image
    voxels: list[int]
    confidence: list[float]


@evaluating()
def segment(predictors: Sequence[Predictor], images: Sequence[LoadedImage]) -> Segmentation:
    """The mask by the mean of the probabilities of all predictors.

    Probabilities of all classes exist for a few slices at a time only: a slab is averaged, its
    strongest class taken, and forgotten.

    Args:
        predictors: one, or an ensemble whose classes are the same.
        images: one scan, as each of the predictors takes it.
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
        mask[done:until] = winner.to(torch.uint8).cpu().numpy()
        strength[done:until] = (highest * CONFIDENCE_STEPS).round().to(torch.uint8).cpu().numpy()
        done = until
        del mean, highest, winner  # not beside the next ones
    # Where members disagree about what validation showed, nothing is taken away.
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


def check_ensemble(predictors: Sequence[Predictor], folders: Sequence[Path]) -> list[VolumeSettings]:
    """The data settings of each run.

    Raises:
        ConfigError: a run does not segment, or the runs differ in labels or channels.
    """
    settings = []
    for one, folder in zip(predictors, folders, strict=True):
        if not isinstance(one.experiment, SegmentationExperiment):
            raise ConfigError(
                f"{folder}: is a run of task {one.experiment.task}; predict needs a segmentation"
            )
        settings.append(one.experiment.data)
    for other, folder in zip(settings, folders, strict=True):
        for key in ("labels", "channels"):
            own, first = getattr(other, key), getattr(settings[0], key)
            if own != first:
                raise ConfigError(
                    f"{folder}: {key} is {own}, in {folders[0]} {first}; an ensemble's must be equal"
                )
    return settings
