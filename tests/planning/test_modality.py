"""Each channel is of the kind that its name says, else of the one that its values show."""

import pytest

from medi3d.datasets.images.settings import Normalisation, VolumeSettings
from medi3d.errors import ConfigError
from medi3d.planning.fingerprint import CaseFacts, Fingerprint
from medi3d.planning.modality import beyond_window, modality_of, plan_channels

PERCENTILE = {"method": "percentile", "background": "ignored"}


def cohort(*ranges: tuple[float, float], **facts: float) -> Fingerprint:
    """One case whose channels have these lowest and highest values; labelled voxels are 0 to 100."""
    intensities = [{"low": low, "high": high, **facts} for low, high in ranges]
    samples = [[float(v) for v in range(101)] for _ in ranges]
    case = CaseFacts("a", (9, 9, 9), (1.0, 1.0, 1.0), "LPS", "0", intensities, samples, {}, {}, {})
    return Fingerprint([case], [])


def chosen(fingerprint, names=(), given=()) -> dict:
    channels = len(fingerprint.cases[0].intensities)
    choices, _ = plan_channels(fingerprint, dict(given), names, channels)
    return {choice.key: choice.value for choice in choices}


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        *[(word, "CT") for word in ("CT", "ct", "CT_venous", "computed tomography")],
        *[(word, "MR") for word in ("MRI", "MR", "T1", "T1w", "t1ce", "T1Gd", "T2", "FLAIR", "ADC")],
        *[(word, "MR") for word in ("MRI (virtual)", "cine-MRI", "T2-FLAIR", "DWI", "PD")],
        *[(word, "PET") for word in ("PET", "PT", "SUV", "FDG-PET")],
        *[(word, word) for word in ("US", "CBCT", "XA", "other")],
        *[(word, None) for word in ("image", "contrast")],
    ],
)
def test_a_word_names_a_modality(name, modality):
    assert modality_of(name) == modality


def test_each_channel_of_pet_and_ct_has_its_own_normalisation():
    choices = chosen(cohort((-1000.0, 900.0), (0.0, 20.0)), ("CT", "PET"))
    assert choices["data.modality"] == "CT"
    ct, pet = choices["data.by_channel"]
    assert (ct["name"], ct["modality"], ct["normalisation"]) == (
        "CT",
        "CT",
        {"method": "window", "window": [0.0, 100.0]},
    )
    assert (pet["modality"], pet["normalisation"]) == ("PET", PERCENTILE)


def test_channels_of_one_kind_share_a_normalisation():
    choices = chosen(cohort((0.0, 900.0), (0.0, 20.0)), ("T1", "FLAIR"))
    assert choices == {"data.modality": "MR", "data.normalisation": PERCENTILE}


@pytest.mark.parametrize(
    ("low", "high"), [(-200, 250), (0, 80), (24, 1100)], ids=["clipped", "stripped", "shifted"]
)
def test_the_word_of_the_list_is_believed(low, high):
    choices, remarks = plan_channels(cohort((low, high)), {}, ("CT",), 1)
    assert (choices[0].value, choices[1].value["method"], remarks) == ("CT", "window", [])


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("CT", (0.0, 4095.0), "not HU: stored without its rescale"),
        ("CT", (0.0, 1.0), "not HU: rescaled already"),
        ("MRI", (-1024.0, 3000.0), "is it MR"),
    ],
)
def test_what_contradicts_the_list_is_reported(name, values, words):
    choices, remarks = plan_channels(cohort(values), {}, (name,), 1)
    assert len(remarks) == 1
    assert words in remarks[0]
    assert words in choices[0].why


@pytest.mark.parametrize(("low", "kind"), [(-1000.0, "CT"), (0.0, "MR")])
def test_without_a_word_the_values_decide(low, kind):
    assert chosen(cohort((low, 900.0)))["data.modality"] == kind


def test_an_unclear_modality_is_asked_for_or_other_where_the_channel_has_a_name():
    with pytest.raises(ConfigError, match="not clear from the images"):
        chosen(cohort((-50.0, 900.0)))
    assert chosen(cohort((-50.0, 900.0)), ("image",))["data.modality"] == "other"
    with pytest.raises(ConfigError, match="SPECT"):
        chosen(cohort((0.0, 9.0)), (), {"data.modality": "SPECT"})


def test_objects_beyond_the_percentiles_widen_them_and_reasons_say_so():
    (_, how), _ = plan_channels(cohort((0.0, 900.0), background=0.9, clipped=0.6), {}, ("PET",), 1)
    assert how.value == {**PERCENTILE, "percentiles": [0.0, 100.0]}
    assert "up to 90.0% of the voxels" in how.why
    assert "60% of the labelled voxels" in how.why


def test_a_window_that_makes_a_channel_constant_is_a_problem():
    how = Normalisation("window", window=[-100.0, 0.0])
    settings = VolumeSettings("", "CT", {"a": 1}, channels=2, normalisation=how)
    (problem,) = beyond_window(cohort((-1000.0, 900.0), (0.0, 20.0)), settings)
    assert "a: channel 1 has values from 0 to 20" in problem
