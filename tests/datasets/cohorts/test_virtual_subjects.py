"""The virtual cohort: repeatable, complete, laid out as everything else reads it, and said to be virtual."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nilearn")

from medi3d.datasets.cohorts.cases import load_case
from medi3d.datasets.cohorts.cohort import read_cohort
from medi3d.datasets.cohorts.virtual_subjects import (
    LABELS,
    Template,
    VirtualSettings,
    load_template,
    virtual_subject,
    write_cohort,
)
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import ConfigError, DataError

SETTINGS = VirtualSettings(labelled=2, held_out=1, spacing=8)


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template(SETTINGS.spacing)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("virtual") / "cohort"
    assert write_cohort(folder, SETTINGS, lambda line: None)
    return folder


def test_a_subject_follows_from_seed_and_number(template: Template) -> None:
    image, label = virtual_subject(template, SETTINGS, 1)
    torch.manual_seed(5)
    again, label_again = virtual_subject(template, SETTINGS, 1)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)


@pytest.mark.parametrize(("number", "seed"), [(2, 0), (1, 1)], ids=["number", "seed"])
def test_another_seed_or_number_is_another_subject(template: Template, number: int, seed: int) -> None:
    one = virtual_subject(template, SETTINGS, 1)
    other = virtual_subject(template, replace(SETTINGS, seed=seed), number)
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[1], other[1])


def test_a_subject_looks_like_the_template(template: Template) -> None:
    still = replace(SETTINGS, displacement=0, log_gamma=0, bias=0, noise=0)
    moved = virtual_subject(template, still, 0)[0]
    assert np.corrcoef(moved.ravel(), template.maps[0].ravel())[0, 1] > 0.5
    assert moved.max() <= 1000 * float(template.maps[0].max()) + 1e-3


def test_white_matter_is_brighter_than_grey(template: Template) -> None:
    image, label = virtual_subject(template, SETTINGS, 0)
    grey, white = (image[label == value].mean() for value in (1, 2))
    assert white > grey > image[label == 0].mean()


def test_the_random_state_of_the_program_is_left_alone(template: Template) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    virtual_subject(template, SETTINGS, 0)
    assert torch.equal(torch.rand(3), expected)


def test_the_cohort_reads_as_any_other(root: Path) -> None:
    cohort = read_cohort(root)
    assert cohort.labels == {"background": 0, **LABELS}
    settings = VolumeSettings(root=str(root), modality="MR", labels=LABELS)
    sample = load_case(cohort.cases[0], settings)
    assert sample["image"].shape == sample["label"].shape
    assert sample["spacing"] == pytest.approx((8, 8, 8))
    assert sample["label"].unique().tolist() == [0, 1, 2]


def test_the_list_says_that_the_subjects_are_virtual(root: Path) -> None:
    assert "VIRTUAL" in json.loads((root / "dataset.json").read_text())["description"]


def test_held_out_subjects_are_in_no_split(root: Path) -> None:
    held_out = {path.name for path in (root / "imagesTs").iterdir()}
    assert len(held_out) == 1
    assert held_out.isdisjoint(case.images[0].name for case in read_cohort(root).cases)


def test_a_cohort_that_is_there_is_kept(root: Path) -> None:
    before = (root / "imagesTr" / "virtual_000.nii.gz").stat().st_mtime_ns
    assert not write_cohort(root, SETTINGS, lambda line: None)
    assert (root / "imagesTr" / "virtual_000.nii.gz").stat().st_mtime_ns == before


def test_an_unfinished_cohort_is_written_again(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path, SETTINGS, stop)
    assert not (tmp_path / "dataset.json").exists()
    assert write_cohort(tmp_path, SETTINGS, lambda line: None)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        write_cohort(tmp_path / "file" / "cohort", SETTINGS, lambda line: None)


@pytest.mark.parametrize("wrong", [{"labelled": 1}, {"spacing": 0}, {"noise": -0.1}], ids=str)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        VirtualSettings(**wrong)
