"""What list and config say is chosen, and what is wrong with them is reported, before an image is read."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from medi3d.datasets.cohorts.cohort import Case, Cohort
from medi3d.planning.early import early_problems, flat, plan_listed

GIVEN = {"task": "segmentation", "name": "a", "strategy": "original", "network": {"source": "unet"}}


def cohort(count: int, images: int = 1, **facts) -> Cohort:
    cases = [
        Case(f"c{n}", tuple(Path(f"c{n}_{k}.nii") for k in range(images)), Path("l.nii"), f"c{n}", **facts)
        for n in range(count)
    ]
    return Cohort(tuple(cases), {"liver": 1}, "cohort")


def chosen(cohort: Cohort, **given) -> dict:
    choices, problems = plan_listed(cohort, given)
    assert not problems
    assert all(choice.why for choice in choices)
    return {choice.key: choice.value for choice in choices}


@pytest.mark.parametrize(("cases", "held"), [(2, 1), (3, 1), (8, 2), (10, 2), (50, 10), (1000, 40)])
def test_the_number_of_cases_decides_how_many_validate(cases, held):
    assert chosen(cohort(cases))["data.validation"] == held


def test_where_list_or_config_say_who_validates_that_holds():
    assert "data.validation" not in chosen(cohort(8), **{"data.folds": 5})
    assert "data.validation" not in chosen(cohort(1))
    parts = [Case(n, (Path(n),), Path("l"), n, "training" if n < "c" else "validation") for n in "abcd"]
    assert "data.validation" not in chosen(Cohort(tuple(parts), {"a": 1}, ""))
    folds = [Case(n, (Path(n),), Path("l"), n, fold=k % 3) for k, n in enumerate("abcdef")]
    choices = chosen(Cohort(tuple(folds), {"a": 1}, ""))
    assert (choices["data.folds"], choices["data.fold"]) == (3, 0)


def test_channels_are_counted_in_the_list_or_a_file(write_nifti):
    assert chosen(cohort(4, images=3))["network.in_channels"] == 3
    file = write_nifti(np.zeros((3, 3, 3, 2), np.float32))
    one = Cohort((Case("a", (file,), Path("l"), "a"),), {"a": 1}, "")
    assert (chosen(one)["data.channels"], chosen(one)["network.in_channels"]) == (2, 2)
    assert chosen(cohort(4), **{"data.channels": 2})["network.in_channels"] == 2


def test_all_problems_are_reported_at_once():
    cases = [
        Case("a", (Path("a"), Path("b")), Path("l"), "a"),
        Case("b", (Path("c"), Path("d")), None, "b"),
        Case("c", (Path("e"),), Path("l"), "c"),
    ]
    _, problems = plan_listed(Cohort(tuple(cases), {"a": 1}, ""), {"network.in_channels": 1})
    assert len(problems) == 3
    for words in (
        "network.in_channels is 1 where a case has 2",
        "case c: 1 image files",
        "case b has no label",
    ):
        assert any(words in problem for problem in problems)


@pytest.mark.parametrize(
    ("data", "other", "words"),
    [
        ({"patch": [16, 16, 16], "shiny": 1}, {}, "data.shiny: unknown key"),
        ({"validation": 9}, {}, "no case is left for training"),
        ({}, {"network": {"source": "nothing"}}, "nothing"),
        ({"by_channel": [{"name": "CT", "modality": "CT"}]}, {}, "channel CT: normalisation.method"),
    ],
    ids=["key", "split", "network", "channel"],
)
def test_a_config_that_cannot_work_is_refused_before_images_are_read(data, other, words):
    given = OmegaConf.create({**GIVEN, **other, "data": {"root": "r", "labels": {"liver": 1}, **data}})
    assert any(words in problem for problem in early_problems(given, cohort(4)))
    del given.data
    given.data = {"root": "r", "labels": {"liver": 1}, "validation": 1}
    given.network = {"source": "unet"}
    assert early_problems(given, cohort(4)) == []
    assert flat(given)["data.validation"] == 1
