"""The corpus of malformed scans, and one of labels, through what training and `prepare` read cases with.

Each case ends in one line that names the file, the same for both, or is read as it should be.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medi3d.datasets.cohorts.cases import load_case
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import DataError
from medi3d.planning.fingerprint import examine_case
from tests.prediction import test_malformed as corpus
from tests.prediction.test_malformed import AFFINE, EVEN, SHAPE, VALUES, mha, nifti, nrrd

SETTINGS = VolumeSettings(root="", modality="MR", labels={"one": 1, "two": 2})
LABEL = (np.arange(VALUES.size).reshape(SHAPE) % 3).astype(np.uint8)
READERS = {"training": load_case, "prepare": examine_case}

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pydicom"),
    pytest.mark.parametrize("read", READERS.values(), ids=READERS),
]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def case_of(image: Path, label: Path | None = None) -> Case:
    if label is None:
        label = image.parent / "right_label.nii"
        nib.save(nib.Nifti1Image(LABEL, AFFINE), label)
    return Case("case", (image,), label, "case")


def refused(read, case: Case, named: Path, word: str = "") -> None:
    with pytest.raises(DataError) as refusal:
        read(case, SETTINGS)
    line = str(refusal.value)
    assert named.name in line
    assert "\n" not in line
    assert word in line


IMAGES = {f"NIfTI: {k}": lambda p, v=v: nifti(p, **v[0]) for k, v in corpus.BAD_HEADERS.items()}
IMAGES |= {f"values: {k}": lambda p, v=v: nifti(p, v[0]) for k, v in corpus.BAD_VALUES.items()}
IMAGES |= {f"NRRD: {k}": lambda p, v=v: nrrd(p, **v) for k, v in corpus.BAD_NRRDS.items()}
IMAGES |= {f"MHA: {k}": lambda p, v=v: mha(p, **v) for k, v in corpus.BAD_MHAS.items()}
IMAGES |= {
    f"packed MHA: {k}": lambda p, v=v: mha(p, v, CompressedData="True") for k, v in corpus.BAD_PACKING.items()
}
IMAGES |= {
    f"file: {k}": lambda p, k=k: (lambda name, data: written(p / name, data))(*corpus.bytes_of(k, p))
    for k in corpus.KINDS
}


@pytest.mark.parametrize("kind", IMAGES)
def test_bad_images_are_refused(read, kind, tmp_path):
    image = IMAGES[kind](tmp_path)
    refused(read, case_of(image), image)


@pytest.mark.parametrize("kind", corpus.BAD_SERIES)
def test_bad_series_are_refused(read, kind, write_series, tmp_path):
    places, tags, word = corpus.BAD_SERIES[kind]
    image = write_series(places, **tags)
    refused(read, case_of(image), image, word)


@pytest.mark.parametrize("kind", corpus.BAD_BYTES)
def test_series_with_a_damaged_file_are_refused(read, kind, write_series):
    image = corpus.rewritten(write_series(EVEN), corpus.BAD_BYTES[kind])
    refused(read, case_of(image), image)


@pytest.mark.parametrize("kind", corpus.GOOD_HEADERS)
def test_odd_images_are_read_right(read, kind, tmp_path):
    (tmp_path / "labels").mkdir()
    image, label = (
        nifti(folder, values, **corpus.GOOD_HEADERS[kind])
        for folder, values in ((tmp_path, VALUES), (tmp_path / "labels", LABEL))
    )
    found = read(case_of(image, label), SETTINGS)
    if read is load_case:
        assert [int((found["label"] == value).sum()) for value in range(3)] == np.bincount(
            LABEL.flat
        ).tolist()
        assert (found["image"] > 0).sum() == corpus.bright(VALUES).sum()
    else:
        assert found.intensities[0]["high"] == pytest.approx(float(VALUES.max()))
        assert sorted(found.shape) == sorted(SHAPE)


def label_of(values, affine=AFFINE):
    def make(folder: Path) -> Path:
        nib.save(nib.Nifti1Image(values, affine, dtype=values.dtype), folder / "label.nii")
        return folder / "label.nii"

    return make


def with_value(value, dtype):
    values = LABEL.astype(dtype)
    values[0, 0, 0] = value
    return label_of(values)


BAD_LABELS = {
    "empty": (label_of(LABEL * 0), "empty"),
    "value too many": (with_value(3, np.uint8), "label values 3 "),
    "negative value": (with_value(-1, np.int16), "label values -1 "),
    "value that wraps round to a label": (with_value(257, np.int16), "label values 257 "),
    "fraction": (with_value(0.5, np.float32), "label values 0.5 "),
    "nearly a label": (with_value(1.001, np.float32), "label values 1.001 "),
    "NaN": (with_value(np.nan, np.float32), "NaN"),
    "infinite": (with_value(np.inf, np.float32), "infinite"),
    "one slice less": (label_of(LABEL[..., 1:]), "not on the grid"),
    "moved by half a voxel": (label_of(LABEL, AFFINE + np.eye(4, k=3)), "not on the grid"),
    "other spacing": (label_of(LABEL, AFFINE @ np.diag([1.1, 1, 1, 1])), "not on the grid"),
    "mirrored": (label_of(LABEL, AFFINE @ np.diag([-1, 1, 1, 1])), "not on the grid"),
    "4D": (label_of(np.stack([LABEL] * 2, -1)), "4D"),
    "2D": (label_of(LABEL[..., 0]), "expected a 3D image"),
    "complex": (label_of(LABEL.astype(np.complex64)), "plain numbers"),
    "colours": (label_of(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])), "colours"),
    "not there": (lambda folder: folder / "label.nii", "no such file"),
    "no image": (lambda folder: written(folder / "label.nii", b"nothing"), ""),
    "a folder of nothing": (lambda folder: (folder / "label").mkdir() or folder / "label", ""),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_labels_are_refused(read, kind, tmp_path):
    make, word = BAD_LABELS[kind]
    label = make(tmp_path)
    nib.save(nib.Nifti1Image(VALUES, AFFINE), tmp_path / "image.nii")
    refused(read, case_of(tmp_path / "image.nii", label), label, word)


TURNED = AFFINE.copy()
TURNED[:, 3] = AFFINE @ [SHAPE[0] - 1, 0, 0, 1]
TURNED[:, 0] *= -1
GOOD_LABELS = {
    "float": label_of(LABEL.astype(np.float64)),
    "big-endian": label_of(LABEL.astype(">i4")),
    "64 bits": label_of(LABEL.astype(np.uint64)),
    "one of the labels missing": label_of(np.where(LABEL == 2, 0, LABEL).astype(np.uint8)),
    "stored from the other end": label_of(LABEL[::-1], TURNED),
    "grid rounded in the header": label_of(LABEL, AFFINE + 1e-5),
}


@pytest.mark.parametrize("kind", GOOD_LABELS)
def test_odd_labels_are_read_right(read, kind, tmp_path):
    nib.save(nib.Nifti1Image(VALUES, AFFINE), tmp_path / "image.nii")
    found = read(case_of(tmp_path / "image.nii", GOOD_LABELS[kind](tmp_path)), SETTINGS)
    due = [int((LABEL == 1).sum()), 0 if "missing" in kind else int((LABEL == 2).sum())]
    if read is load_case:
        assert [int((found["label"] == value).sum()) for value in (1, 2)] == due
    else:
        millilitre = abs(np.linalg.det(AFFINE)) / 1000
        assert list(found.millilitres.values()) == pytest.approx([count * millilitre for count in due])
