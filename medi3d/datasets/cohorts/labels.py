"""Read a label file as a map of label numbers, from values, layers or segments."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medi3d.datasets.cohorts.structures import join_masks, whole_numbers
from medi3d.datasets.images.dicom_labels import dicom_label_file, read_dicom_labels
from medi3d.datasets.images.files import read_channels
from medi3d.datasets.images.formats import suffix_of
from medi3d.datasets.images.itk import read_itk_header
from medi3d.datasets.images.lattice import on_grid_of
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import DataError


@dataclass(frozen=True)
class Segment:
    """A segment as 3D Slicer describes it in the header of a `.seg.nrrd`."""

    name: str
    layer: int
    value: int


def read_label(path: Path, settings: VolumeSettings, like: sitk.Image | None = None) -> sitk.Image:
    """Read and check a label file, as uint8 with the labels numbered 1, 2, ... in the order of their values.

    Segments of 3D Slicer are matched by name if their names are labels of the config, else by value.
    Several layers without names are the masks of the labels, in their order.

    Args:
        path: The file.
        settings: Which labels there are.
        like: The image that the label belongs to, as read; None if there is none.

    Raises:
        DataError: A value is not a whole number or not in `settings.labels`, the voxels are not those of
            `like` (see `on_grid_of`), layers overlap and `settings.overlaps` does not say which wins, or all
            voxels are background and `settings.empty_labels` does not allow that.
    """
    layers, segments = _layers(path, settings, like)
    if like is not None:
        cropped = bool(segments) or path.name.lower().endswith(".seg.nrrd")
        layers = [_placed(layer, like, path, cropped) for layer in layers]
    arrays = [sitk.GetArrayViewFromImage(layer) for layer in layers]
    if any(segment.name in settings.labels for segment in segments):
        numbered = _by_name(arrays, segments, settings, path)
    elif len(arrays) > 1:
        numbered = _by_layer(arrays, segments, settings, path)
    else:
        numbered = _by_value(arrays[0], settings, path)
    if not numbered.any() and not settings.empty_labels:
        raise DataError(
            f"{path}: the label is empty, every voxel is background (0); data.empty_labels: true takes it"
        )
    image = sitk.GetImageFromArray(numbered)
    image.CopyInformation(layers[0])
    return image


def _layers(
    path: Path, settings: VolumeSettings, like: sitk.Image | None
) -> tuple[list[sitk.Image], list[Segment]]:
    """The label maps in a file, and the segments that it describes; DICOM is matched by name already."""
    if found := dicom_label_file(path):
        named = {name: value for name, value in settings.labels.items() if value != 0}
        order, lacks = settings.overlaps, settings.empty_labels
        return [read_dicom_labels(found, named, like, order=order, may_lack=lacks)], []
    layers = [whole_numbers(layer, settings, path) for layer in read_channels(path)]
    return layers, read_segments(path)


def _placed(mask: sitk.Image, like: sitk.Image, path: Path, cropped: bool) -> sitk.Image:
    try:
        return on_grid_of(mask, like, cropped=cropped)
    except DataError as error:
        raise DataError(f"{path}: the label is not on the grid of its image: {error}") from error


def read_segments(path: Path) -> list[Segment]:
    """The segments that the header of an NRRD file describes; none in any other file.

    Raises:
        DataError: The file is damaged, or a segment's value or layer is not a number.
    """
    if path.is_dir() or suffix_of(path) not in (".nrrd", ".nhdr"):
        return []
    reader = read_itk_header(path)
    facts = {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
    numbers = sorted(int(found[1]) for key in facts if (found := re.fullmatch(r"Segment(\d+)_Name", key)))
    try:
        return [
            Segment(
                facts[f"Segment{number}_Name"],
                int(facts.get(f"Segment{number}_Layer", 0)),
                int(facts.get(f"Segment{number}_LabelValue", number + 1)),
            )
            for number in numbers
        ]
    except ValueError as error:
        raise DataError(f"{path}: a segment's layer or value is not a number ({error})") from error


def _by_name(
    arrays: list[np.ndarray], segments: list[Segment], settings: VolumeSettings, path: Path
) -> np.ndarray:
    """Match segments by name: Slicer's values follow the order in which they were drawn."""
    place = {segment.name: segment for segment in segments}
    known = {(segment.layer, segment.value) for segment in segments if segment.name in settings.labels}
    for layer, array in enumerate(arrays):
        others = set(np.unique(array).tolist()) - {0} - {value for number, value in known if number == layer}
        if others:
            names = [s.name for s in segments if s.layer == layer and s.value in others]
            shown = ", ".join(names) or f"the values {sorted(others)[:5]}"
            expected = ", ".join(settings.label_names)
            raise DataError(f"{path}: holds {shown}, not among the labels of the config ({expected})")

    def inside(name: str) -> np.ndarray:
        if name not in place or not 0 <= place[name].layer < len(arrays):
            return np.zeros(arrays[0].shape, bool)
        return arrays[place[name].layer] == place[name].value

    return join_masks(inside, settings, str(path))


def _by_layer(
    arrays: list[np.ndarray], segments: list[Segment], settings: VolumeSettings, path: Path
) -> np.ndarray:
    """Match by value if each value is in one layer and is a label; else layer 1 is label 1, and so on."""
    values = [set(np.unique(array).tolist()) - {0} for array in arrays]
    together = [value for one in values for value in one]
    by_value = dict(zip(settings.file_values[1:].tolist(), settings.label_names, strict=True))
    layer_of: dict[str, tuple[int, float]] = {}
    if len(set(together)) == len(together) and set(together) <= set(by_value) and len(set(together)) > 1:
        layer_of = {by_value[value]: (k, value) for k, one in enumerate(values) for value in one}
    elif len(arrays) == len(settings.label_names) and all(len(one) <= 1 for one in values) and not segments:
        layer_of = {
            name: (k, next(iter(one)))
            for k, (name, one) in enumerate(zip(settings.label_names, values, strict=True))
            if one
        }
    elif together:
        named = ", ".join(segment.name for segment in segments) or "no segment names in the header"
        raise DataError(
            f"{path}: {len(arrays)} layers ({named}) where the config has the labels "
            f"{', '.join(settings.label_names)}; name the labels like the segments, or one per layer"
        )

    def inside(name: str) -> np.ndarray:
        if name not in layer_of:
            return np.zeros(arrays[0].shape, bool)
        layer, value = layer_of[name]
        return arrays[layer] == value

    return join_masks(inside, settings, str(path))


def _by_value(array: np.ndarray, settings: VolumeSettings, path: Path) -> np.ndarray:
    present, places = np.unique(array, return_inverse=True)
    unknown = sorted(set(present.tolist()) - {0, *settings.labels.values()})
    if unknown:
        known = ", ".join(f"{name} {value}" for name, value in settings.labels.items())
        shown = ", ".join(f"{value:g}" for value in unknown[:5])
        fractions = any(value != round(value) for value in unknown)
        remedy = "labels are whole numbers" if fractions else f"give data.labels.NAME={unknown[0]:g}"
        raise DataError(
            f"{path}: label values {shown} are not among those of the config (background 0, {known}); "
            f"{remedy}"
        )
    numbers = {int(value): number for number, value in enumerate(settings.file_values)}
    table = np.array([numbers.get(int(value), 0) for value in present], np.uint8)
    return table[places].reshape(array.shape)
