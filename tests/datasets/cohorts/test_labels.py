"""Labels as people keep them: any whole numbers, rounded floats, Slicer's segments and layers, crops."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medi3d.datasets.cohorts.cases import load_case
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.cohorts.labels import read_label
from medi3d.datasets.images.files import read_volume, write_mask
from medi3d.datasets.images.preprocessing import to_file_values
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import DataError

SETTINGS = VolumeSettings("", "MR", {"bright": 1, "dark": 2})
SHAPE = (8, 9, 10)
LABEL = np.zeros(SHAPE, np.uint8)
LABEL[2:4, 3:6, 4:8], LABEL[5:7, 1:4, 2:5] = 1, 2


def numbers(path: Path, settings: VolumeSettings = SETTINGS, like: sitk.Image | None = None) -> np.ndarray:
    return sitk.GetArrayFromImage(read_label(path, settings, like)).T


@pytest.mark.parametrize(
    "values",
    [LABEL.astype(np.float32) * np.float32(0.9999999), LABEL + 9e-4 * (LABEL > 0), LABEL.astype(np.int64)],
    ids=["rounded", "within 1e-3", "int64"],
)
def test_whole_numbers_but_for_rounding_are_those_numbers(values, write_nifti):
    np.testing.assert_array_equal(numbers(write_nifti(values)), LABEL)


def test_a_fraction_is_no_label(write_nifti):
    with pytest.raises(DataError, match=r"label values 1.002 .* whole numbers"):
        numbers(write_nifti(np.where(LABEL == 1, 1.002, LABEL)))


def test_any_whole_number_is_a_value_and_comes_back_in_masks(write_nifti, tmp_path):
    settings = replace(SETTINGS, labels={"lh": 1001, "rh": 2035, "odd": -7})
    values = np.array([0, 1001, 2035, -7], np.int16)[np.where(LABEL.any(axis=2, keepdims=True), LABEL, 3)]
    path = write_nifti(values)
    assert settings.label_names == ["odd", "lh", "rh"]
    label = read_label(path, settings)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label).T, _number(values))
    write_mask(to_file_values(label, settings), path, tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(tmp_path / "mask.nii.gz")).T, values)


def _number(values: np.ndarray) -> np.ndarray:
    return np.select([values == -7, values == 1001, values == 2035], [1, 2, 3], 0)


def test_a_value_that_the_config_lacks_is_named_with_the_key(write_nifti):
    with pytest.raises(DataError, match=r"label values 255 .*data\.labels\.NAME=255"):
        numbers(write_nifti(np.where(LABEL > 0, 255, 0).astype(np.uint8)))


def write_slicer(path: Path, layers: list[np.ndarray], segments: list[tuple[str, int, int]]) -> Path:
    """Layers (X, Y, Z) with segments (name, layer, value), as 3D Slicer writes them."""
    stacked = np.stack(layers, -1).transpose(2, 1, 0, 3)
    image = sitk.GetImageFromArray(stacked if len(layers) > 1 else stacked[..., 0], isVector=len(layers) > 1)
    for number, (name, layer, value) in enumerate(segments):
        for key, fact in (
            ("Name", name),
            ("Layer", layer),
            ("LabelValue", value),
            ("ID", f"Segment_{number}"),
        ):
            image.SetMetaData(f"Segment{number}_{key}", str(fact))
    sitk.WriteImage(image, str(path), True)
    return path


@pytest.mark.parametrize(
    ("layers", "segments"),
    [
        ([LABEL == 1, LABEL == 2], []),
        ([LABEL == 1, 2 * (LABEL == 2)], []),
        ([LABEL == 2, LABEL == 1], [("dark", 0, 1), ("bright", 1, 1)]),
        ([np.array([0, 2, 1])[LABEL]], [("bright", 0, 2), ("dark", 0, 1)]),
        ([LABEL], [("Segment_1", 0, 1), ("Segment_2", 0, 2)]),
    ],
    ids=[
        "layers in order",
        "layers by value",
        "layers by name",
        "names before values",
        "names that say nothing",
    ],
)
def test_segments_of_slicer(layers, segments, tmp_path):
    path = write_slicer(tmp_path / "a.seg.nrrd", [np.asarray(one, np.uint8) for one in layers], segments)
    np.testing.assert_array_equal(numbers(path), LABEL)


def test_what_layers_mean_is_not_guessed(tmp_path):
    layers = [np.asarray(n == LABEL, np.uint8) for n in (1, 2, 1)]
    with pytest.raises(DataError, match=r"3 layers .* bright, dark"):
        numbers(write_slicer(tmp_path / "a.seg.nrrd", layers, []))
    with pytest.raises(DataError, match="holds lung, not among"):
        numbers(write_slicer(tmp_path / "b.seg.nrrd", [LABEL], [("bright", 0, 1), ("lung", 0, 2)]))
    overlapping = [np.asarray(LABEL > 0, np.uint8), np.asarray(LABEL == 2, np.uint8)]
    path = write_slicer(tmp_path / "c.seg.nrrd", overlapping, [])
    with pytest.raises(DataError, match=r"data\.overlaps"):
        numbers(path)
    np.testing.assert_array_equal(numbers(path, replace(SETTINGS, overlaps=["bright", "dark"])), LABEL)


def test_a_cropped_segmentation_lies_where_its_image_does(write_nifti, tmp_path):
    image = write_nifti(
        np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), np.diag([1, 2, 3, 1.0])
    )
    whole = sitk.GetImageFromArray(LABEL.T)
    whole.CopyInformation(read_volume(image))
    sitk.WriteImage(whole[1:7, :, 2:8], str(tmp_path / "a.seg.nrrd"), True)
    sample = load_case(Case("a", (image,), tmp_path / "a.seg.nrrd", "a"), SETTINGS)
    np.testing.assert_array_equal(sample["label"][0].numpy(), LABEL[::-1, ::-1].T)
