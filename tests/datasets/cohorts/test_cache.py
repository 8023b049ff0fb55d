"""Cached cases are the cases; a change of files or settings is seen; nothing half-made is used."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from medi3d.datasets.cohorts.cache import cache_path, fill_cache, load_cached
from medi3d.datasets.cohorts.cases import load_case
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.settings import Normalisation, VolumeSettings
from medi3d.datasets.sampling.patches import sample_patch
from medi3d.errors import DataError

SHAPE = (9, 12, 10)


@pytest.fixture
def case(write_nifti, tmp_path) -> Case:
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    label = (image > 1.2).astype(np.uint8)
    label[4, 5, 6] = 3
    images = (write_nifti(image, name="image.nii.gz"),)
    return Case("one", images, write_nifti(label, name="label.nii.gz"), "one")


@pytest.fixture
def settings(tmp_path) -> VolumeSettings:
    labels = {"bright": 1, "none": 2, "rare": 3, "never": 9}
    return VolumeSettings("", "MR", labels, cache=str(tmp_path / "cache"))


def test_what_is_kept_is_what_was_loaded(case, settings):
    made, kept, fresh = load_cached(case, settings), load_cached(case, settings), load_case(case, settings)
    for sample in (made, kept):
        assert (sample["name"], sample["spacing"]) == (fresh["name"], fresh["spacing"])
        torch.testing.assert_close(sample["image"], fresh["image"], rtol=0, atol=0)
        torch.testing.assert_close(sample["label"], fresh["label"])
    counts = fresh["label"].flatten().bincount()[1:].tolist()
    assert [len(places) for places in kept["places"]] == counts


def test_patches_are_the_same_with_and_without(case, settings):
    patches = []
    for load in (load_case, load_cached):
        torch.manual_seed(3)
        patches.append([sample_patch(load(case, settings), (5, 14, 6), 0.7) for _ in range(6)])
    for plain, cached in zip(*patches, strict=True):
        assert plain.keys() == cached.keys()
        torch.testing.assert_close(plain["image"], cached["image"], rtol=0, atol=0)
        torch.testing.assert_close(plain["label"], cached["label"])


@pytest.mark.parametrize(
    "change",
    [
        {"spacing": [1.0, 1.0, 2.0]},
        {"normalisation": Normalisation("zscore")},
        {"labels": {"rare": 1, "none": 2, "bright": 3}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_have_another_file(case, settings, change):
    assert cache_path(case, replace(settings, **change)) != cache_path(case, settings)
    assert cache_path(case, replace(settings, patch=[1, 2, 3], fold=0)) == cache_path(case, settings)


def test_a_file_that_changed_is_read_again(case, settings, write_nifti):
    before = load_cached(case, settings)["image"].clone()
    write_nifti(np.random.default_rng(1).normal(size=SHAPE).astype(np.float32), name="image.nii.gz")
    assert not torch.equal(load_cached(case, settings)["image"], before)


def test_a_damaged_file_is_made_again(case, settings):
    whole = load_cached(case, settings)["image"].clone()
    path = cache_path(case, settings)
    path.write_bytes(path.read_bytes()[:100])
    torch.testing.assert_close(load_cached(case, settings)["image"], whole)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_filling_names_each_bad_case_and_keeps_the_good(case, settings, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    bad = Case("bad", (tmp_path / "bad.nii.gz",), None, "bad")
    problems = list(fill_cache([case, bad], settings, workers=2))
    assert sorted(problem is None for problem in problems) == [False, True]
    assert "bad.nii.gz" in next(problem for problem in problems if problem)
    assert cache_path(case, settings).is_file()


def test_a_folder_that_cannot_be_written_is_one_error(case, settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        load_cached(case, replace(settings, cache=str(tmp_path / "file" / "cache")))


def test_what_a_killed_process_left_is_swept(case, settings):
    path = cache_path(case, settings)
    left = path.with_name(f"{path.name}.123.tmp")
    left.mkdir(parents=True)
    (left / ".tmp5j0xhG").write_bytes(b"half")  # as safetensors 0.8 writes, before it renames
    assert list(fill_cache([case], settings, workers=1)) == [None]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
