"""Masks of single structures become one label map, or a line about the one that does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medi3d.datasets.cohorts.cache import cache_path, load_cached
from medi3d.datasets.cohorts.cases import load_case, load_label
from medi3d.datasets.cohorts.cohort import read_cohort
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import ConfigError, DataError
from medi3d.planning.fingerprint import examine_case

SHAPE = (6, 7, 8)
SETTINGS = VolumeSettings("", "MR", {"spleen": 7, "liver": 3})
LIVER, SPLEEN = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
LIVER[1:3, 2:5], SPLEEN[3:5, 2:5] = 255, 1


@pytest.fixture
def root(tmp_path, write_nifti) -> Path:
    """One case, its masks in a folder, and a list that names it."""
    write_nifti(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), name="a.nii.gz")
    write_nifti(LIVER, name="masks/liver.nii.gz")
    write_nifti(SPLEEN, name="masks/spleen.nii.gz")
    write_nifti(np.full(SHAPE, 9, np.uint8), name="masks/body.nii.gz")
    (tmp_path / "list.csv").write_text("image,label\na.nii.gz,masks\n")
    return tmp_path


def case_of(listing: Path):
    return read_cohort(listing).cases[0]


def expected() -> np.ndarray:
    """Numbered by value: liver 3 is 1, spleen 7 is 2. Files are (x, y, z), RAS; samples (z, y, x), LPS."""
    return ((LIVER > 0) * 1 + (SPLEEN > 0) * 2)[::-1, ::-1].T


def test_masks_of_a_folder_are_joined(root):
    case = case_of(root / "list.csv")
    assert dict(case.structures)["liver"] == root / "masks/liver.nii.gz"
    assert np.array_equal(load_case(case, SETTINGS)["label"][0], expected())
    facts = examine_case(case, SETTINGS)
    assert facts.millilitres["liver"] == pytest.approx(facts.millilitres["spleen"])


@pytest.mark.parametrize("kind", ["columns", "json"])
def test_other_ways_to_name_the_masks(root, kind):
    files = {"liver": "masks/liver.nii.gz", "spleen": "masks/spleen.nii.gz"}
    if kind == "columns":
        listing = root / "columns.csv"
        listing.write_text("image,label:liver,label:spleen\na.nii.gz," + ",".join(files.values()) + "\n")
    else:
        listing = root / "list.json"
        listing.write_text(json.dumps([{"image": "a.nii.gz", "label": files}]))
    assert case_of(listing).structures == tuple((name, root / file) for name, file in files.items())
    assert np.array_equal(load_case(case_of(listing), SETTINGS)["label"][0], expected())


def test_the_order_decides_where_masks_overlap(root, write_nifti):
    write_nifti(np.maximum(SPLEEN, LIVER > 0), name="masks/spleen.nii.gz")
    case = case_of(root / "list.csv")
    with pytest.raises(DataError, match=r"spleen\.nii\.gz: 48 voxels are liver"):
        load_label(case, SETTINGS)
    volumes = {}
    for order in (["liver", "spleen"], ["spleen", "liver"]):
        label = load_case(case, replace(SETTINGS, overlaps=order))["label"]
        volumes[order[-1]] = [int((label == number).sum()) for number in (1, 2)]
    assert volumes == {"spleen": [0, 96], "liver": [48, 48]}
    with pytest.raises(ConfigError, match="overlaps"):
        replace(SETTINGS, overlaps=["liver"])


def test_a_mask_on_another_grid_is_refused(root, write_nifti):
    write_nifti(SPLEEN[:-1], name="masks/spleen.nii.gz")
    with pytest.raises(DataError, match=r"spleen\.nii\.gz: the mask is not on the grid"):
        load_case(case_of(root / "list.csv"), SETTINGS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16), "holds the values 1, 2, 3"),
        (np.where(SPLEEN, np.nan, 0).astype(np.float32), "NaN"),
    ],
    ids=["several values", "NaN"],
)
def test_what_is_no_mask_is_refused(root, write_nifti, values, message):
    write_nifti(values, name="masks/spleen.nii.gz")
    with pytest.raises(DataError, match=message):
        load_case(case_of(root / "list.csv"), SETTINGS)


def test_a_structure_without_a_file_is_not_taken_for_absent(root, write_nifti):
    (root / "masks/spleen.nii.gz").unlink()
    with pytest.raises(DataError, match="case a: no mask of spleen"):
        load_case(case_of(root / "list.csv"), SETTINGS)
    write_nifti(SPLEEN * 0, name="masks/spleen.nii.gz")
    assert load_case(case_of(root / "list.csv"), SETTINGS)["label"].unique().tolist() == [0, 1]
    write_nifti(LIVER * 0, name="masks/liver.nii.gz")
    with pytest.raises(DataError, match="empty"):
        load_case(case_of(root / "list.csv"), SETTINGS)


def test_two_files_of_one_name(root, write_nifti):
    write_nifti(SPLEEN, name="masks/spleen.nii")
    with pytest.raises(DataError, match=r"spleen\.nii"):
        case_of(root / "list.csv")


def test_the_cache_knows_every_mask(root, write_nifti, tmp_path):
    settings = replace(SETTINGS, cache=str(tmp_path / "cache"))
    case = case_of(root / "list.csv")
    assert np.array_equal(load_cached(case, settings)["label"][0], expected())
    before = cache_path(case, settings)
    write_nifti(SPLEEN[::-1].copy(), name="masks/spleen.nii.gz")
    renamed = replace(case, structures=tuple((f"{name}s", path) for name, path in case.structures))
    assert len({before, cache_path(case, settings), cache_path(renamed, settings)}) == 3
