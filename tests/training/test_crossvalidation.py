"""All folds: each case is judged once, by a network that has not seen it; a stopped one goes on."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import stats

from medi3d.cli.entry import main
from medi3d.datasets.cohorts.cohort import read_cohort
from medi3d.datasets.cohorts.splits import split_cases
from medi3d.errors import ConfigError, DataError, WeightsError
from medi3d.evaluation.statistics import mean_interval, paired_effect
from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run
from medi3d.prediction.predict import run_prediction
from medi3d.prediction.predictor import load_members
from medi3d.training import crossvalidation
from medi3d.training.crossvalidation import evaluate_folds, run_folds, summarise
from tests.processes import run_two_processes
from tests.tiny import CONFIG

OPTIONS = ["data.folds=3", "data.fold=all", "training.steps=2", "training.validate_every=1"]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def timeless(path):
    return [{key: cell for key, cell in row.items() if key != "seconds"} for row in rows_of(path)]


@pytest.fixture(scope="module")
def listed(cohort, tmp_path_factory):
    """The cohort as a list in which two cases each are of one subject, and two are a test set."""
    path = tmp_path_factory.mktemp("list") / "list.csv"
    lines = ["name,image,label,subject,split"]
    for number in range(8):
        files = [cohort / part / f"case_{number}.nii.gz" for part in ("imagesTr", "labelsTr")]
        split = "test" if number > 5 else "training"
        lines.append(f"{number:03},{files[0]},{files[1]},s{number // 2},{split}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def run(listed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(CONFIG.format(root=listed))
    run_folds(Run(folder / "tiny", load_config(folder / "tiny.yaml", OPTIONS)))
    return folder / "tiny"


def test_every_case_is_judged_once_by_the_fold_that_has_not_seen_it(run):
    rows = rows_of(run / "cases.csv")
    assert len(rows) == 2 * 6
    assert {row["case"] for row in rows} == {f"{number:03}" for number in range(6)}
    for member in Run.open(run).members:
        fold = member.experiment
        training, validation = split_cases(read_cohort(fold.data.root).cases, fold.data)
        held = {row["case"] for row in rows if row["fold"] == str(fold.data.fold)}
        assert held == {case.name for case in validation}
        assert not {case.subject for case in training} & {case.subject for case in validation}
        assert json.loads(member.finished.read_text())["step"] == 2


def test_the_summary_is_the_mean_of_the_cases(run):
    rows, table = rows_of(run / "cases.csv"), rows_of(run / "summary.csv")
    assert [row["label"] for row in table] == ["low", "high", "mean"]
    for row in table:
        values = [float(case["dice"]) for case in rows if row["label"] in (case["label"], "mean")]
        assert float(row["dice"]) == pytest.approx(np.mean(values), abs=1e-5)
        assert float(row["dice_low"]) <= float(row["dice"]) <= float(row["dice_high"])
    assert "each scored by the fold" in (run / "report.html").read_text()


def test_a_stopped_run_goes_on_where_it_was(run, tmp_path, monkeypatch):
    copy = tmp_path / "tiny"
    shutil.copytree(run, copy)
    (copy / "fold1" / "finished.json").unlink()
    shutil.rmtree(copy / "fold2")
    trained = []
    train = crossvalidation.run_training
    monkeypatch.setattr(
        crossvalidation,
        "run_training",
        lambda fold, resume: trained.append(fold.folder.name) or train(fold, resume=resume),
    )
    with pytest.raises(ConfigError, match="--resume"):
        run_folds(Run.open(copy))
    run_folds(Run.open(copy), resume=True)
    assert trained == ["fold1", "fold2"]
    assert timeless(copy / "cases.csv") == timeless(run / "cases.csv")


def test_another_config_is_refused(run, tmp_path):
    (tmp_path / "other.yaml").write_text((run / "config.yaml").read_text())
    other = load_config(tmp_path / "other.yaml", ["training.steps=3"])
    with pytest.raises(ConfigError, match="steps: 2, not 3"):
        run_folds(Run(run, other), resume=True)


def test_the_folds_are_an_ensemble(run, cohort, tmp_path):
    scan = cohort / "imagesTr" / "case_6.nii.gz"
    (written,), failed = run_prediction([Run.open(run)], [scan], tmp_path / "all")
    assert not failed
    folds = [Run.open(run / f"fold{k}") for k in range(3)]
    (same,), _ = run_prediction(folds, [scan], tmp_path / "each")
    assert np.array_equal(nib.load(written).dataobj, nib.load(same).dataobj)


def test_the_folder_decides_about_components_for_all(run, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(run, copy)
    (copy / "postprocessing.json").write_text('{"largest_component": ["high"]}')
    (copy / "fold0" / "postprocessing.json").write_text('{"largest_component": ["low"]}')
    assert [one.largest for one in load_members(Run.open(copy))] == [[2]] * 3


def test_a_split_of_the_list_is_judged_by_all_folds(run):
    table = evaluate_folds(Run.open(run), "test")
    assert table[-1]["cases"] == 2
    assert len(rows_of(run / "cases_test.csv")) == 4
    with pytest.raises(ConfigError, match="fold0"):
        evaluate_folds(Run.open(run), "training")


def test_evaluate_on_the_command_line(run, monkeypatch, capsys, tmp_path):
    before = rows_of(run / "summary.csv")
    monkeypatch.setattr("sys.argv", ["medi3d", "evaluate", str(run), "--json", str(tmp_path / "out.json")])
    main_quietly()
    assert json.loads((tmp_path / "out.json").read_text())[-1]["cases"] == 6
    assert [row["dice"] for row in rows_of(run / "summary.csv")] == [row["dice"] for row in before]


def main_quietly():
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0


def test_too_many_folds_and_a_fold_not_trained(config, run, tmp_path):
    with pytest.raises(DataError, match="8 subjects cannot make 9 folds"):
        run_folds(Run(tmp_path / "tiny", load_config(config, ["data.folds=9", "data.fold=all"])))
    with pytest.raises(ConfigError, match="folds is 0, fold all"):
        load_config(config, ["data.fold=all"])
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "fold2")
    with pytest.raises(WeightsError, match="fold2"):
        load_members(Run.open(copy))


def test_what_a_crossvalidation_is(config):
    assert load_config(config, ["data.folds=3", "data.fold=all"]).is_crossvalidation
    assert not load_config(config, ["data.folds=3", "data.fold=1"]).is_crossvalidation


def test_interval_of_single_cases_is_that_of_the_paired_test():
    values = np.random.default_rng(1).normal(0.8, 0.05, 30)
    mean, low, high = mean_interval(values, [str(k) for k in range(30)])
    peer = paired_effect(values[None])
    assert mean == pytest.approx(peer.mean)
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=2e-3)


def test_interval_covers_as_often_as_it_says():
    generator, hits = np.random.default_rng(0), 0
    for _ in range(300):
        people = generator.normal(0, 1, 10).repeat(3) + generator.normal(0, 0.3, 30)
        _, low, high = mean_interval(people, [str(k // 3) for k in range(30)])
        hits += low < 0 < high
    assert stats.binom.cdf(hits, 300, 0.95) > 1e-3


def test_interval_of_one_subject_is_unknown():
    table = summarise(
        [{"case": c, "label": "a", "dice": d} for c, d in (("x", 0.5), ("y", 0.7))], {"x": "s", "y": "s"}
    )
    assert table[0]["dice"] == pytest.approx(0.6)
    assert np.isnan(table[0]["dice_low"])


@pytest.mark.slow
def test_two_processes_make_the_folds_of_one(run, tmp_path):
    """They join once for all folds; one of them judges while the other waits."""
    command = ["train", run.parent / "tiny.yaml", *OPTIONS, "--runs", tmp_path]
    logs = run_two_processes(*command, folder=tmp_path)
    assert sum(log.count("All folds") for log in logs) == 1
    for two, one in zip(*(rows_of(folder / "cases.csv") for folder in (tmp_path / "tiny", run)), strict=True):
        assert (two["case"], two["label"], two["fold"]) == (one["case"], one["label"], one["fold"])
        assert float(two["dice"]) == pytest.approx(float(one["dice"]), abs=0.01)
