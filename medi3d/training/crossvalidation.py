"""Cross-validation: every fold trained in turn, every case judged by the network that has not seen it."""

import json
from collections.abc import Sequence
from pathlib import Path

from medi3d.datasets.cohorts.cohort import read_cohort
from medi3d.engine import distributed
from medi3d.engine.log import log
from medi3d.engine.metrics import Row
from medi3d.errors import ConfigError
from medi3d.evaluation.evaluate import METRICS, run_evaluation
from medi3d.evaluation.statistics import mean_interval
from medi3d.experiment.run_folder import check_folder, start_folder
from medi3d.experiment.settings import Experiment, SegmentationExperiment
from medi3d.files import read_table, write_table, written_aside
from medi3d.prediction.postprocessing import decide, write_largest
from medi3d.prediction.predictor import members
from medi3d.reports.run_report import write_report
from medi3d.training.train import run_training

FINISHED = "finished.json"
"""In the folder of a fold whose network is trained and judged."""


def run_folds(experiment: Experiment, folder: Path, *, resume: bool = False) -> list[Row]:
    """Train every fold in `folder/fold0`, `fold1`, ..., then judge the whole cohort; see `judge_folds`.

    Args:
        experiment: with data.fold "all".
        folder: of the folds; made if it is not there.
        resume: skip the folds that are finished, and go on with the one that was stopped.

    Raises:
        ConfigError, DataError, TrainingError: as `run_training`.
    """
    folds = members(experiment, folder)
    check_folder(experiment, folder, folds[0][1] / "checkpoints" / "last.pt", resume)
    with distributed.joined_processes():  # once: joining anew for each fold, they miss each other
        first = distributed.is_writer()
        if first:
            start_folder(experiment, folder)
        for number, (fold, place) in enumerate(folds):
            if (place / FINISHED).is_file():
                log.info(f"fold {number} of 0 to {len(folds) - 1}: finished already")
                continue
            log.info(f"fold {number} of 0 to {len(folds) - 1}")
            row = run_training(fold, place, resume=True)
            if first:
                with written_aside(place / FINISHED) as aside:
                    aside.write_text(json.dumps(row, indent=2) + "\n")
    return judge_folds(experiment, folder) if first else []


def evaluate_folds(experiment: Experiment, folder: Path, split: str) -> list[Row]:
    """Judge the folds anew: each on its own cases ("validation"), or all together on a split of the list.

    Raises:
        ConfigError: the split is "training", of which every case trained some of the folds.
        DataError, WeightsError: as `run_evaluation`.
    """
    if split == "training":
        raise ConfigError(
            "--split training: with all folds each case trains some and validates one; take validation, a "
            f"split that the cohort's list names, or one fold, such as {folder / 'fold0'}"
        )
    if split != "validation":
        return summarise(run_evaluation(experiment, folder, split), _subjects(experiment))
    for run in members(experiment, folder):
        run_evaluation(*run)
    return judge_folds(experiment, folder)


def judge_folds(experiment: Experiment, folder: Path) -> list[Row]:
    """Put the validations of all folds together.

    Writes into `folder`: `cases.csv` (every case once, by the network that has not seen it), `summary.csv`,
    `report.html`, and of which labels the folds together keep only the largest component.

    Returns:
        The rows of `summary.csv`, see `summarise`.
    """
    runs = members(experiment, folder)
    rows = [
        {"case": row.pop("case"), "fold": number, **row}
        for number, (_, place) in enumerate(runs)
        for row in read_table(place / "cases.csv", words=("case", "label"))
    ]
    write_table(folder / "cases.csv", rows)
    write_largest(folder, decide(rows))
    table = summarise(rows, _subjects(experiment))
    write_table(folder / "summary.csv", table)
    folds = [
        {"fold": number, **summarise([row for row in rows if row["fold"] == number])[-1]}
        for number in range(len(runs))
    ]
    title = f"All {table[-1]['cases']} cases, each judged by the fold that has not seen it"
    report = write_report(experiment, folder, {title: spoken(table), "Folds": spoken(folds), "Cases": rows})
    log.info(f"report: {report}")
    return table


def summarise(rows: Sequence[Row], subjects: dict[str, str] | None = None) -> list[Row]:
    """A row for each label, and "mean" over the labels: cases, and of each metric mean, low and high end.

    Args:
        rows: one for each case and label.
        subjects: name of a case -> its subject, whose cases are drawn together for the 95 % interval; a case
            that is not in it is a subject of its own.
    """
    cases = list(dict.fromkeys(row["case"] for row in rows))
    groups = [(subjects or {}).get(case, case) for case in cases]
    table = []
    for label in (*dict.fromkeys(row["label"] for row in rows), "mean"):
        summed: Row = {"label": label, "cases": len(cases)}
        for metric in (metric for metric in METRICS if metric in rows[0]):
            values: dict[str, list[float]] = {case: [] for case in cases}
            for row in rows:
                if label in (row["label"], "mean"):
                    values[row["case"]].append(row[metric])
            means = [sum(values[case]) / len(values[case]) for case in cases]
            mean, low, high = mean_interval(means, groups)
            summed |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
        table.append(summed)
    return table


def spoken(table: Sequence[Row]) -> list[Row]:
    """Rows of `summarise` with each interval in brackets behind its mean, for people."""
    return [
        {
            key: f"{value:.4f} ({row[f'{key}_low']:.4f} to {row[f'{key}_high']:.4f})"
            if key in METRICS
            else value
            for key, value in row.items()
            if not key.endswith(("_low", "_high"))
        }
        for row in table
    ]


def _subjects(experiment: Experiment) -> dict[str, str]:
    assert isinstance(experiment, SegmentationExperiment)
    return {case.name: case.subject for case in read_cohort(experiment.data.root).cases}
