"""A trained network on new scans: masks on the scans' own grids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from torch import Tensor, nn

from medi3d.datasets.files import suffix_of, write_mask
from medi3d.datasets.volumes import LoadedImage, VolumeSettings, load_image, restore_mask, to_file_values
from medi3d.engine import distributed
from medi3d.engine.inference import Inferer, mirrored, predict, predict_labels
from medi3d.engine.log import log
from medi3d.engine.precision import Precision
from medi3d.engine.state import load_network
from medi3d.errors import ConfigError, Medi3dError
from medi3d.transfer.building import make_network, make_task
from medi3d.transfer.experiment import Experiment, SegmentationExperiment

MASK_SUFFIX = {".mhd": ".mha", ".nhdr": ".nrrd", "": ".nii.gz"}
"""Suffix of a scan -> of its mask, where they differ; a DICOM folder has none."""


@dataclass(frozen=True)
class Predictor:
    """A trained network with all that it takes to predict a case."""

    experiment: Experiment
    network: nn.Module
    inferer: Inferer
    precision: Precision

    @classmethod
    def load(cls, experiment: Experiment, folder: Path) -> "Predictor":
        """The best network of the run in `folder`.

        Raises:
            WeightsError: the run has no complete checkpoint, or it is of another network.
        """
        task = make_task(experiment)
        network = make_network(experiment, task, pretrained=False)
        load_network(folder / "checkpoints" / "best.pt", network)
        precision = Precision.choose(experiment.training.precision, distributed.local_device())
        inferer = mirrored(task.inferer, experiment.prediction.mirror)
        return cls(experiment, precision.place_network(network).eval(), inferer, precision)

    def logits(self, image: Tensor) -> Tensor:
        """Logits `(classes, ...)` of one image or clip `(C, D, H, W)`."""
        return predict(image, self.network, self.inferer, self.precision)

    def label_map(self, image: LoadedImage) -> np.ndarray:
        """Predicted label map `(D, H, W)` on the network's grid, that of `image.canonical`."""
        return predict_labels(image.image, self.network, self.inferer, self.precision)

    def segment(self, image: LoadedImage) -> sitk.Image:
        """The mask of a loaded scan, on the grid of its file."""
        return restore_mask(self.label_map(image), image.canonical, image.original)


def run_prediction(
    experiment: Experiment, folder: Path, inputs: Sequence[Path], out: Path
) -> tuple[list[Path], list[str]]:
    """Segment scans with the best network of a run. A scan that fails does not stop the others.

    Args:
        experiment: of the run, from its `config.yaml`.
        folder: the run folder.
        inputs: NIfTI, NRRD or MetaImage files, or folders of one DICOM series each.
        out: folder for the masks, each under the name of its scan; a DICOM series gives NIfTI.

    Returns:
        The masks that were written, and a line about each scan that failed.

    Raises:
        ConfigError: the run does not segment, or two inputs would write one mask.
        WeightsError: the run has no usable checkpoint.
    """
    if not isinstance(experiment, SegmentationExperiment):
        raise ConfigError(f"{folder}: is a run of task {experiment.task}; predict needs a segmentation")
    return predict_files(Predictor.load(experiment, folder), experiment.data, inputs, out)


def predict_files(
    predictor: Predictor, settings: VolumeSettings, inputs: Sequence[Path], out: Path
) -> tuple[list[Path], list[str]]:
    """Segment scans with a loaded network; arguments and answer as those of `run_prediction`."""
    written, failed = [], []
    for path, target in _targets(inputs, out).items():
        try:
            image = load_image([path], settings)
            write_mask(to_file_values(predictor.segment(image), settings), path, target)
        except Medi3dError as error:
            failed.append(str(error))
            continue
        written.append(target)
        log.info(f"{path} -> {target}")
    return written, failed


def _targets(inputs: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Scan -> mask. Where several scans have one name, that of their folder is put in front."""
    names = [_mask_name(path) for path in inputs]
    targets: dict[Path, Path] = {}
    for path, name in zip(inputs, names, strict=True):
        prefix = f"{path.resolve().parent.name}_" if names.count(name) > 1 else ""
        target = out / f"{prefix}{name}"
        if target in targets.values():
            raise ConfigError(f"{path}: another input is written to {target} too; predict them apart")
        if target.resolve() == path.resolve():
            raise ConfigError(f"{path}: the mask would replace the scan; give another folder with --out")
        targets[path] = target
    return targets


def _mask_name(path: Path) -> str:
    if path.is_dir():
        return path.resolve().name + MASK_SUFFIX[""]
    suffix = suffix_of(path)
    return path.name[: len(path.name) - len(suffix)] + MASK_SUFFIX.get(suffix, suffix)
