"""Cohorts are read from every layout, split by subject, and each bad case is named in one line."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medi3d.datasets.cohorts.cases import load_case, read_label
from medi3d.datasets.cohorts.cohort import Case, read_cohort
from medi3d.datasets.cohorts.splits import split_cases, split_cohort
from medi3d.datasets.images.preprocessing import to_file_values
from medi3d.datasets.images.settings import Normalisation, VolumeSettings
from medi3d.errors import DataError

SETTINGS = VolumeSettings("", "MR", {"Anterior": 1, "Posterior": 2})
SHAPE = (6, 7, 8)


def image_values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def label_values() -> np.ndarray:
    values = np.zeros(SHAPE, np.uint8)
    values[1:3, 2:5, 3:6], values[3:5, 2:5, 3:6] = 1, 2
    return values


@pytest.fixture
def msd(tmp_path, write_nifti) -> Path:
    """Three cases in the MSD layout; the folder."""
    entries = []
    for number in range(3):
        write_nifti(image_values(), name=f"imagesTr/case_{number:03}.nii.gz")
        write_nifti(label_values(), name=f"labelsTr/case_{number:03}.nii.gz")
        entries.append({key: f"./{key}sTr/case_{number:03}.nii.gz" for key in ("image", "label")})
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    described = {"name": "Hippo", "modality": {"0": "MRI"}, "labels": labels, "training": entries, "test": []}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    return tmp_path


def test_msd_layout(msd):
    cohort = read_cohort(msd)
    assert (cohort.name, cohort.channels) == ("Hippo", ("MRI",))
    assert cohort.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    first = cohort.cases[0]
    assert (first.name, first.subject, first.split) == ("case_000", "case_000", None)
    assert first.images == (msd / "imagesTr/case_000.nii.gz",)
    assert first.label == msd / "labelsTr/case_000.nii.gz"


def test_csv_list_with_channels_subjects_and_splits(msd):
    rows = "image,label,subject,split\n"
    rows += "imagesTr/case_000.nii.gz; imagesTr/case_001.nii.gz,labelsTr/case_000.nii.gz,anna,Training\n"
    rows += "imagesTr/case_002.nii.gz,,ben,validation\n"
    (msd / "list.csv").write_text(rows)
    first, second = read_cohort(msd / "list.csv").cases
    assert [path.name for path in first.images] == ["case_000.nii.gz", "case_001.nii.gz"]
    assert (first.subject, first.split, first.name) == ("anna", "training", "case_000")
    assert (second.label, second.split) == (None, "validation")


def test_json_list_is_the_csv_list(msd):
    (msd / "list.csv").write_text("image,label\n" + "imagesTr/case_000.nii.gz,labelsTr/case_000.nii.gz\n")
    entry = {"image": ["imagesTr/case_000.nii.gz"], "label": "labelsTr/case_000.nii.gz"}
    (msd / "list.json").write_text(json.dumps([entry]))
    assert read_cohort(msd / "list.json").cases == read_cohort(msd / "list.csv").cases


def test_files_of_one_name_in_folders_of_their_own_are_cases_of_their_own(write_nifti, tmp_path):
    for subject in ("sub-01", "sub-02"):
        write_nifti(image_values(), name=f"{subject}/t1.nii.gz")
    (tmp_path / "list.csv").write_text("image\nsub-01/t1.nii.gz\nsub-02/t1.nii.gz\n")
    assert [case.name for case in read_cohort(tmp_path / "list.csv").cases] == ["sub-01_t1", "sub-02_t1"]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("list.csv", "image,label\n", "no case"),
        ("list.csv", "scan,label\na,b\n", "no column 'image'"),
        ("list.csv", "", "no column 'image'"),
        ("list.csv", "image\nnone.nii.gz\n", "none.nii.gz: no such file"),
        ("list.csv", "image,label\nimagesTr/case_000.nii.gz,gone.nii.gz\n", "gone.nii.gz: no such file"),
        ("list.csv", "image,label\n,labelsTr/case_000.nii.gz\n", "case 1 has no image"),
        ("list.csv", "image\n" + "imagesTr/case_000.nii.gz\n" * 2, "more than once"),
        ("list.json", "{", "not readable as JSON"),
        ("list.json", "[]", "no case"),
        ("list.json", "[1]", "expected a list"),
        ("list.json", '{"cases": []}', "expected a list"),
        ("list.json", '{"training": [{"image": 3}]}', "case 1 has no image"),
        ("list.json", '{"labels": 3, "training": [{"image": "imagesTr/case_000.nii.gz"}]}', "labels is 3"),
        (
            "list.json",
            '{"modality": 3, "training": [{"image": "imagesTr/case_000.nii.gz"}]}',
            "modality is",
        ),
        ("list.txt", "x", "a cohort is a folder"),
    ],
)
def test_a_bad_list_is_refused_in_one_line(name, content, word, msd):
    (msd / name).write_text(content)
    with pytest.raises(DataError, match=word) as caught:
        read_cohort(msd / name)
    assert "\n" not in str(caught.value)


def test_channel_files_must_be_as_many_as_named(msd):
    files = ["imagesTr/case_000.nii.gz", "imagesTr/case_001.nii.gz"]
    described = {"modality": {"0": "FLAIR", "1": "T1", "2": "T2"}, "training": [{"image": files}]}
    (msd / "list.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="2 image files where modality names 3"):
        read_cohort(msd / "list.json")


def test_a_folder_without_list_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.json: no such file"):
        read_cohort(tmp_path)


def cases(count: int, per_subject: int = 1, split=None) -> list[Case]:
    names = [f"case{number:02}" for number in range(count)]
    return [Case(n, (Path(n),), None, f"s{i // per_subject}", split) for i, n in enumerate(names)]


def test_a_split_is_fixed_by_its_seed_alone():
    training, held = split_cohort(cases(20), 5, seed=3)
    assert (len(training), len(held)) == (15, 5)
    assert (training, held) == split_cohort(cases(20)[::-1], 5, seed=3)
    assert held != split_cohort(cases(20), 5, seed=4)[1]


def test_a_split_parts_no_subject():
    training, held = split_cohort(cases(20, per_subject=2), 5)
    assert len(held) == 6
    assert not {case.subject for case in training} & {case.subject for case in held}


def test_named_splits_win():
    listed = cases(6, split="training")[:3] + cases(6, split="val")[3:5] + cases(6, split="test")[5:]
    training, held = split_cohort(listed, validation=1)
    assert [len(training), len(held)] == [3, 2]


@pytest.mark.parametrize(
    ("listed", "word"),
    [
        (cases(4), "no case is left for training"),
        (cases(4)[:2] + cases(4, split="training")[2:], "names no split"),
        (
            cases(4, 4, "training")[:2] + cases(4, 4, "validation")[2:],
            "subject s0 is in training and in validation",
        ),
        (cases(4, split="validation"), "no case is left for training"),
    ],
    ids=["all held back", "half named", "subject in both", "none for training"],
)
def test_impossible_splits_are_refused(listed, word):
    with pytest.raises(DataError, match=word):
        split_cohort(listed, validation=4)


def test_a_case_is_loaded_in_the_inner_order(msd):
    sample = load_case(read_cohort(msd).cases[0], SETTINGS)
    assert sample["image"].shape == sample["label"].shape == (1, 8, 7, 6)
    assert (sample["image"].dtype, sample["label"].dtype) == (torch.float32, torch.uint8)
    assert (sample["name"], sample["spacing"]) == ("case_000", (1, 1, 1))
    # NIfTI runs to right-anterior-superior here, we to left-posterior-superior.
    np.testing.assert_array_equal(sample["label"][0], label_values()[::-1, ::-1].T)


def test_a_case_is_resampled_with_its_label(msd):
    sample = load_case(read_cohort(msd).cases[0], replace(SETTINGS, spacing=[2.0, 0.5, 1.0]))
    assert sample["image"].shape == sample["label"].shape == (1, 4, 14, 6)
    assert sample["label"].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["files", "4d"])
def test_channels_come_from_files_or_from_the_fourth_dimension(kind, msd, write_nifti):
    one = msd / "imagesTr/case_000.nii.gz"
    both = write_nifti(np.stack([image_values(), -image_values()], -1), name="both.nii.gz")
    case = Case("a", (one, one) if kind == "files" else (both,), None, "a")
    assert load_case(case, replace(SETTINGS, channels=2))["image"].shape == (2, 8, 7, 6)
    with pytest.raises(DataError, match=r"2 channels .* channels: 1"):
        load_case(case, SETTINGS)


def _damage(kind: str, msd: Path) -> str:
    """Damage the first case; the name of the file that must be blamed."""
    image, label = msd / "imagesTr/case_000.nii.gz", msd / "labelsTr/case_000.nii.gz"
    values, marks, affine = image_values(), label_values(), np.eye(4)
    if kind == "nan":
        values[1, 1, 1] = np.nan
    elif kind == "infinite":
        values[1, 1, 1] = np.inf
    elif kind == "constant":
        values[:] = 4
    elif kind == "4d":
        values = np.stack([values] * 3, -1)
    elif kind == "label-4d":
        marks = np.stack([marks] * 2, -1)
    elif kind == "shape":
        marks = marks[:-1]
    elif kind == "unknown-value":
        marks[0, 0, 0] = 7
    elif kind == "fraction":
        marks = marks * 0.5
    elif kind == "empty-label":
        marks[:] = 0
    elif kind in ("shifted", "other-spacing", "mirrored"):
        affine = {
            "shifted": np.eye(4),
            "other-spacing": np.diag([1.0, 1, 2, 1]),
            "mirrored": np.diag([-1.0, 1, 1, 1]),
        }
        affine = affine[kind] + (np.eye(4, k=3) if kind == "shifted" else 0)
    nib.save(nib.Nifti1Image(values, np.eye(4)), image)
    nib.save(nib.Nifti1Image(marks, affine), label)
    if kind == "empty-file":
        image.write_bytes(b"")
    if kind == "truncated":
        image.write_bytes(image.read_bytes()[:600])
    if kind == "truncated-label":
        label.write_bytes(gzip.compress(gzip.decompress(label.read_bytes())[:500]))
    if kind == "gone":
        image.unlink()
    blames_label = kind.startswith(("label", "shape", "unknown", "fraction", "empty-label", "shifted"))
    return (
        "labelsTr" if blames_label or kind in ("other-spacing", "mirrored", "truncated-label") else "imagesTr"
    )


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("nan", "1 voxels are NaN"),
        ("infinite", "1 voxels are NaN or infinite"),
        ("constant", "every voxel is 4"),
        ("4d", "a 4D image of 3 channels .* channels: 1"),
        ("label-4d", "2 layers"),
        ("shape", "not on the grid of its image: shape"),
        ("shifted", "not on the grid of its image.* 1 mm apart"),
        ("other-spacing", "not on the grid of its image.*spacing"),
        ("mirrored", "not on the grid"),
        ("unknown-value", r"label values 7 are not among .*Anterior 1, Posterior 2"),
        ("fraction", "label values 0.5"),
        ("empty-label", "label is empty"),
        ("empty-file", "0 bytes"),
        ("truncated", "damaged"),
        ("truncated-label", "damaged"),
        ("gone", "no such file"),
    ],
)
def test_a_bad_case_names_its_file_in_one_line(kind, word, msd):
    case = read_cohort(msd).cases[0]
    folder = _damage(kind, msd)
    with pytest.raises(DataError, match=word) as caught:
        load_case(case, SETTINGS)
    assert f"{folder}/case_000.nii.gz" in str(caught.value).split(": ")[0]
    assert "\n" not in str(caught.value)


def test_rounding_in_a_header_is_no_difference(msd):
    affine = np.diag([1.002, 1.002, 1.002, 1])  # 8 voxels of it are more than 8 mm: a slice more, if believed
    nib.save(nib.Nifti1Image(label_values(), affine), msd / "labelsTr/case_000.nii.gz")
    sample = load_case(read_cohort(msd).cases[0], replace(SETTINGS, spacing=[0.5, 0.5, 2.0]))
    assert sample["label"].shape == sample["image"].shape


REAL = {
    "Task04_Hippocampus": (200, 1, "MR"),
    "OpenKBP_HeadNeckCT": (60, 1, "CT"),
    "ACDC_subset_nominal_spacing": (15, 1, "MR"),
    "BraTS2013_DeepMedicExample": (2, 2, "MR"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_cohorts_load(name, shared):
    count, channels, modality = REAL[name]
    cohort = read_cohort(shared / name)
    assert len(cohort.cases) == count
    how = Normalisation("window", window=[-200, 300]) if modality == "CT" else Normalisation()
    settings = VolumeSettings("", modality, cohort.labels, channels, normalisation=how)
    sample = load_case(cohort.cases[0], settings)
    assert len(sample["image"]) == channels
    assert (sample["image"].min(), sample["image"].max()) == (-1, 1)
    assert sample["label"].unique().tolist() == list(range(len(settings.file_values)))


def test_left_and_right_are_the_bodys(shared):
    """OpenKBP is stored PLI; in our arrays the left parotid has the higher index along the last axis."""
    cohort = read_cohort(shared / "OpenKBP_HeadNeckCT")
    how = Normalisation("window", window=[-200, 300])
    label = load_case(cohort.cases[0], VolumeSettings("", "CT", cohort.labels, normalisation=how))["label"][0]
    centre = {name: (label == value).nonzero().float().mean(0) for name, value in cohort.labels.items()}
    assert centre["LeftParotid"][2] > centre["RightParotid"][2]
    assert centre["Brainstem"][0] > centre["SpinalCord"][0]  # superior
    assert centre["SpinalCord"][1] > centre["Mandible"][1]  # posterior


def test_labels_are_numbered_by_their_values_and_gaps_do_no_harm(msd):
    """BraTS has 1, 2 and 4."""
    settings = replace(SETTINGS, labels={"high": 2, "low": 1, "none": 0})
    plain = load_case(read_cohort(msd).cases[0], settings)["label"]
    write_values = np.where(label_values() == 2, 7, label_values())
    nib.save(nib.Nifti1Image(write_values.astype(np.uint8), np.eye(4)), msd / "labelsTr/case_000.nii.gz")
    gap = replace(SETTINGS, labels={"high": 7, "low": 1})
    numbered = read_label(msd / "labelsTr/case_000.nii.gz", gap)
    assert (gap.label_names, gap.file_values.tolist()) == (["low", "high"], [0, 1, 7])
    assert set(plain.unique().tolist()) == set(np.unique(sitk.GetArrayFromImage(numbered))) == {0, 1, 2}
    written = sitk.GetArrayFromImage(to_file_values(numbered, gap))
    np.testing.assert_array_equal(written, write_values.T)


def test_a_case_with_nothing_labelled_is_taken_if_that_is_allowed(msd):
    path = msd / "labelsTr/case_000.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4)), path)
    allowed = replace(SETTINGS, empty_labels=True)
    assert not sitk.GetArrayFromImage(read_label(path, allowed)).any()
    with pytest.raises(DataError, match="empty_labels"):
        read_label(path, SETTINGS)


def test_folds_are_nnunets_and_part_the_cohort(tmp_path):
    """Where scikit-learn is there: KFold(5, shuffle=True, random_state=12345), as nnU-Net v2 splits."""
    selection = pytest.importorskip("sklearn.model_selection")
    names = [f"case_{number:02}" for number in range(23)]
    cases = [Case(name, (), None, name) for name in names]
    parts = [split_cases(cases, replace(SETTINGS, folds=5, fold=fold)) for fold in range(5)]
    known = selection.KFold(5, shuffle=True, random_state=12345).split(names)
    for (training, held), (known_training, known_held) in zip(parts, known, strict=True):
        assert [case.name for case in held] == [names[place] for place in known_held]
        assert [case.name for case in training] == [names[place] for place in known_training]


SPLITS = ("training", "training", "validation")


def test_folds_keep_subjects_together_and_leave_the_test_set_out():
    cases = [
        Case(f"{s}{n}", (), None, s, split) for s in "abcdef" for n, split in enumerate(["training"] * 3)
    ]
    cases.append(Case("z", (), None, "z", "test"))
    held = [split_cases(cases, replace(SETTINGS, folds=3, fold=fold))[1] for fold in range(3)]
    assert sorted(case.name for part in held for case in part) == sorted(c.name for c in cases[:-1])
    assert all(len({c.subject for c in part}) * 3 == len(part) for part in held)
    with pytest.raises(DataError, match="cannot make 9 folds"):
        split_cases(cases, replace(SETTINGS, folds=9))
