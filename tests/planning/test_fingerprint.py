"""A cohort is described as it is, and every bad case is named at once."""

from dataclasses import replace

import numpy as np
import pytest

from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.errors import DataError
from medi3d.planning.fingerprint import examine_case, examine_cohort, gather

SETTINGS = VolumeSettings("", "MR", {"left": 1, "right": 2})
SHAPE = (10, 12, 8)  # (X, Y, Z) in the file


@pytest.fixture
def case_of(write_nifti):
    """Writes a case with two blocks of label 1 and one of label 2."""

    def write(name: str, seed: int = 0, low: float = 0.0) -> Case:
        image = np.random.default_rng(seed).uniform(low, 100, SHAPE).astype(np.float32)
        label = np.zeros(SHAPE, np.uint8)
        label[:3, :2, :2], label[6:8, :2, :2], label[:, 8:, 4:] = 1, 1, 2
        image[label == 2] = 50
        paths = (write_nifti(image, name=f"{name}.nii.gz", affine=np.diag([2.0, 1, 3, 1])),)
        return Case(
            name, paths, write_nifti(label, name=f"{name}_l.nii.gz", affine=np.diag([2.0, 1, 3, 1])), name
        )

    return write


def test_facts_are_those_of_the_volume(case_of):
    facts = examine_case(case_of("a"), SETTINGS)
    assert (facts.shape, facts.spacing, facts.orientation) == ((8, 12, 10), (3, 1, 2), "RAS")
    assert facts.millilitres == pytest.approx({"left": 20 * 0.006, "right": 160 * 0.006})
    assert facts.pieces == {"left": 2, "right": 1}
    assert facts.largest == pytest.approx({"left": 12 / 20, "right": 1})
    assert 0 <= facts.intensities[0]["low"] < facts.intensities[0]["high"] <= 100
    assert sum(value == 50 for value in facts.samples[0]) == 160


def test_all_bad_cases_are_named_and_the_good_are_kept(case_of, write_nifti, tmp_path):
    good, twin = case_of("good", seed=1), case_of("twin", seed=1)
    broken = case_of("broken", seed=2)
    broken.images[0].write_bytes(b"")
    odd = case_of("odd", seed=3)
    write_nifti(np.full(SHAPE, 7, np.uint8), name="odd_l.nii.gz", affine=np.diag([2.0, 1, 3, 1]))
    fingerprint = gather(list(examine_cohort([good, twin, broken, odd], SETTINGS, workers=1)))
    assert [facts.name for facts in fingerprint.cases] == ["good", "twin"]
    assert len(fingerprint.problems) == 3
    for word in (
        "broken.nii.gz: the file is empty",
        "odd_l.nii.gz: label values 7",
        "twin: has the voxels of good",
    ):
        assert any(word in problem for problem in fingerprint.problems)


@pytest.mark.parametrize(("low", "modality"), [(-1000.0, "CT"), (0.0, "MR"), (-40.0, None)])
def test_the_modality_is_told_only_where_it_is_clear(case_of, low, modality):
    facts = [examine_case(case_of(name, ord(name), low), SETTINGS) for name in "ab"]
    assert gather(facts).modality() == modality


def test_channels_that_the_config_does_not_name_are_refused(case_of):
    with pytest.raises(DataError, match="1 channels, but the config says channels: 2"):
        examine_case(case_of("a"), replace(SETTINGS, channels=2))
