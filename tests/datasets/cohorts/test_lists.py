"""Lists as people write them mean what they say."""

import json
import logging
from pathlib import Path

import pytest

from medi3d.datasets.cohorts.cohort import Case, read_cohort
from medi3d.datasets.cohorts.splits import listed_folds, split_cases, split_cohort
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import DataError

NAMES = [f"c{number}" for number in range(4)]
ROWS = [{"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"} for name in NAMES]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Empty files: a list opens none of them."""
    for row in ROWS:
        for file in row.values():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
    return tmp_path


def write(root: Path, what: object, name: str = "list.json") -> Path:
    (root / name).write_text(json.dumps(what))
    return root / name


def is_whole(cases: tuple[Case, ...], root: Path) -> bool:
    return [(case.name, case.images, case.label) for case in cases] == [
        (name, (root / f"images/{name}.nii.gz",), root / f"labels/{name}.nii.gz") for name in NAMES
    ]


LINES = ["image,label", *(f"{row['image']},{row['label']}" for row in ROWS)]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(line.replace(",", ", ") for line in LINES).encode(),
        "\n".join(line.replace(",", " ,\t") for line in LINES).encode(),
        "\r\n".join([*LINES, ",", ""]).encode("utf-8-sig"),
        "\n".join(LINES).encode("utf-16"),
        "\n".join(line.replace("/", "\\") for line in LINES).encode(),
        "\n".join([LINES[0].upper(), *LINES[1:]]).encode(),
    ],
    ids=["blanks", "blanks and tabs", "BOM and empty rows", "UTF-16", "Windows paths", "upper case"],
)
def test_csv(content, root):
    (root / "list.csv").write_bytes(content)
    assert is_whole(read_cohort(root / "list.csv").cases, root)


def test_columns_of_masks_may_have_blanks_too(root):
    line = "images/c0.nii.gz , labels/c0.nii.gz, labels/c1.nii.gz"
    (root / "list.csv").write_text(f"image, label: liver , label:left kidney\n{line}\n")
    (case,) = read_cohort(root / "list.csv").cases
    assert [name for name, _ in case.structures] == ["liver", "left kidney"]


@pytest.mark.parametrize(
    ("encoding", "slash"),
    [("utf-8-sig", "/"), ("utf-16", "/"), ("utf-8", "\\")],
    ids=["BOM", "UTF-16", "paths"],
)
def test_json_from_windows(encoding, slash, root):
    text = json.dumps({"training": [{k: v.replace("/", slash) for k, v in row.items()} for row in ROWS]})
    (root / "list.json").write_bytes(text.encode(encoding))
    assert is_whole(read_cohort(root / "list.json").cases, root)


def test_version_1_of_nnunet_lists_names_without_the_number_of_the_channel(root):
    for row in ROWS:
        path = root / row["image"]
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
        path.with_name(path.name.replace(".nii.gz", "_0001.nii.gz")).touch()
    cases = read_cohort(write(root, {"modality": {"0": "T1", "1": "T2"}, "training": ROWS})).cases
    assert [case.name for case in cases] == NAMES
    assert [path.name for path in cases[0].images] == ["c0_0000.nii.gz", "c0_0001.nii.gz"]


def test_parts_of_a_monai_list_are_splits(root):
    listed = {"training": ROWS[:2], "validation": ROWS[2:3], "testing": [ROWS[3]["image"]], "modality": "CT"}
    cohort = read_cohort(write(root, listed))
    assert [case.split for case in cohort.cases] == ["training", "training", "validation", "test"]
    assert cohort.channels == ("CT",)
    training, validation = split_cohort(cohort.cases, 40)
    assert [[case.name for case in part] for part in (training, validation)] == [["c0", "c1"], ["c2"]]


def test_folds_of_a_monai_list_hold(root):
    folds = [1, 0, 1, 0]
    rows = [{**row, "fold": fold} for row, fold in zip(ROWS, folds, strict=True)]
    cases = read_cohort(write(root, {"training": rows})).cases
    assert listed_folds(cases) == 2
    for fold in (0, 1):
        settings = VolumeSettings("", "MR", {"a": 1}, folds=2, fold=fold)
        training, validation = split_cases(cases, settings)
        assert [case.fold for case in validation] == [fold] * 2
        assert {case.name for case in (*training, *validation)} == set(NAMES)
    with pytest.raises(DataError, match=r"names 2 folds .*data\.folds=2"):
        split_cases(cases, VolumeSettings("", "MR", {"a": 1}, folds=4))
    with pytest.raises(DataError, match="c3 names no fold"):
        listed_folds(read_cohort(write(root, {"training": [*rows[:3], ROWS[3]]})).cases)


@pytest.mark.parametrize(
    ("listed", "word"),
    [
        ({"training": [{**ROWS[0], "lable": "x"}]}, "'lable' is not known and not used; label"),
        ({"training": ROWS, "valdiation": []}, "'valdiation' is not known and not used; validation"),
        ({"training": ROWS, "description": "", "tensorImageSize": "4D", "relase": 1}, None),
    ],
    ids=["of a case", "of the list", "known"],
)
def test_words_that_mean_nothing_are_reported(listed, word, root, caplog):
    with caplog.at_level(logging.WARNING):
        read_cohort(write(root, listed))
    assert (word in caplog.text) if word else not caplog.text


def test_without_validation_cases_the_training_is_validated_on():
    cases = [Case(name, (Path(name),), None, name) for name in NAMES[:2]]
    assert split_cohort(cases[:1], 0) == (cases[:1], cases[:1])
    assert split_cohort(cases, 1)[0] != split_cohort(cases, 1)[1]
    with pytest.raises(DataError, match=r"data\.validation: 40\); hold fewer back with data\.validation=1"):
        split_cohort(cases, 40)
    with pytest.raises(DataError, match=r"overfit on purpose with data\.validation=0"):
        split_cohort(cases[:1], 40)


def test_a_folder_named_by_a_number_with_dots_keeps_its_name(root):
    rows = []
    for number in ("1.2.840.17", "1.2.840.18"):
        (root / number).mkdir()
        rows.append({"image": number})
    assert [case.name for case in read_cohort(write(root, rows)).cases] == ["1.2.840.17", "1.2.840.18"]
