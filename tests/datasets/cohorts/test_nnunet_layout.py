"""nnU-Net's raw layout is read as it is, and what it may hold and medi3d does not know is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from medi3d.datasets.cohorts.cases import load_case
from medi3d.datasets.cohorts.cohort import read_cohort
from medi3d.datasets.cohorts.splits import split_cases, split_cohort
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import DataError

SHAPE = (6, 7, 8)
LABELS = {"background": 0, "liver": 1, "tumour": 2}
SETTINGS = VolumeSettings("", "MR", {"liver": 1, "tumour": 2}, channels=2)


def describe(root: Path, **changes) -> Path:
    """A `dataset.json`; keys that are None are left out."""
    described = {"channel_names": {"0": "T1", "1": "T2"}, "labels": LABELS, "file_ending": ".nii.gz"}
    described = {key: value for key, value in {**described, "numTraining": 3, **changes}.items() if value}
    (root / "dataset.json").write_text(json.dumps(described))
    return root


@pytest.fixture
def raw(tmp_path, write_nifti) -> Path:
    """Three training cases with two channels and a test case without label."""
    values, label = np.random.default_rng(0), np.zeros(SHAPE, np.uint8)
    label[1:3], label[3:5] = 1, 2
    for name in ("Tr/liver_2", "Tr/liver_10", "Tr/liver_b_0001", "Ts/liver_9"):
        for channel in range(2):
            image = values.normal(size=SHAPE).astype(np.float32)
            write_nifti(image, name=f"images{name}_{channel:04}.nii.gz")
        if "Tr" in name:
            write_nifti(label, name=f"labels{name}.nii.gz")
    return describe(tmp_path)


def test_cases_channels_and_labels(raw):
    cohort = read_cohort(raw)
    assert cohort.labels == LABELS
    assert cohort.channels == ("T1", "T2")
    assert [(case.name, case.split) for case in cohort.cases] == [
        ("liver_10", None),
        ("liver_2", None),
        ("liver_b_0001", None),
        ("liver_9", "test"),
    ]
    first, last = cohort.cases[0], cohort.cases[-1]
    assert [path.name for path in first.images] == ["liver_10_0000.nii.gz", "liver_10_0001.nii.gz"]
    assert (first.label, last.label) == (raw / "labelsTr/liver_10.nii.gz", None)
    sample = load_case(first, SETTINGS)
    assert sample["image"].shape[0] == 2
    assert sample["label"].unique().tolist() == [0, 1, 2]


def test_the_test_set_is_in_no_split(raw):
    cases = read_cohort(raw).cases
    folds = VolumeSettings("", "MR", {"liver": 1}, folds=3)
    for training, validation in (split_cohort(cases, 1), split_cases(cases, folds)):
        assert len(training) == 2
        assert {case.name for case in (*training, *validation)} == {"liver_10", "liver_2", "liver_b_0001"}


def test_cases_that_the_file_names_itself(raw):
    (raw / "labelsTr/liver_10.nii.gz").rename(raw / "elsewhere.nii.gz")
    images = [f"imagesTr/liver_10_{channel:04}.nii.gz" for channel in range(2)]
    describe(raw, numTraining=1, dataset={"ten": {"images": images, "label": "elsewhere.nii.gz"}})
    case = read_cohort(raw).cases[0]
    assert (case.name, case.label) == ("ten", raw / "elsewhere.nii.gz")


BAD = {
    "regions": ({"labels": {"background": 0, "whole": [1, 2]}}, "whole is a region"),
    "ignored": ({"labels": {**LABELS, "ignore": 3}}, "ignore"),
    "no ending": ({"file_ending": None}, "file_ending is None"),
    "pictures": ({"file_ending": ".png"}, "'.png'"),
    "another number": ({"numTraining": 4}, "numTraining is 4, but there are 3"),
    "one channel": ({"channel_names": {"0": "T1"}}, "liver_10: has the channels 0000, 0001; expected 1"),
    "three channels": ({"channel_names": {"0": "a", "1": "b", "2": "c"}}, "expected 3"),
    "dataset without images": ({"dataset": {"ten": {"label": "x"}}}, "images"),
    "another ending": ({"file_ending": ".nrrd"}, "there are 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name, raw):
    changes, message = BAD[name]
    with pytest.raises(DataError, match=message):
        read_cohort(describe(raw, **changes))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("labelsTr/liver_2.nii.gz", "liver_2: has no label"),
        ("imagesTr/liver_2_0001.nii.gz", "liver_2: has the channels 0000"),
        ("imagesTr/liver_2_0000.nii.gz", "liver_2: has the channels 0001"),
    ],
)
def test_a_file_that_is_missing(raw, lost, message):
    (raw / lost).unlink()
    with pytest.raises(DataError, match=message):
        read_cohort(raw)


def test_files_out_of_place(raw, write_nifti):
    write_nifti(np.zeros(SHAPE, np.uint8), name="labelsTr/other.nii.gz")
    with pytest.raises(DataError, match="other: has no image"):
        read_cohort(raw)
    (raw / "imagesTr/liver_2_0000.nii.gz").rename(raw / "imagesTr/liver_2.nii.gz")
    with pytest.raises(DataError, match="CASE_0000"):
        read_cohort(raw)
