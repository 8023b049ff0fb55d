"""Cross-validation: every fold trained in turn, every case scored by the fold that held it out."""

import json
import math
from collections.abc import Sequence

from medi3d.datasets.cohorts.cohort import read_cohort
from medi3d.engine import distributed
from medi3d.engine.log import log
from medi3d.engine.metrics import Row, mean_of_present
from medi3d.errors import ConfigError
from medi3d.evaluation.evaluate import METRICS, run_evaluation
from medi3d.evaluation.statistics import mean_interval
from medi3d.experiment.run import Run
from medi3d.files import read_table, write_table, written_aside
from medi3d.prediction.postprocessing import decide, write_largest
from medi3d.reports.run_report import write_report
from medi3d.training.train import run_training

BOUNDS = {"hd95": (0.0, math.inf)}
"""Where the values of a metric lie, if not between 0 and 1."""


def run_folds(run: Run, *, resume: bool = False) -> list[Row]:
    """Train every fold in `fold0`, `fold1`, ... of the run folder, then score the whole cohort.

    Args:
        run: with data.fold "all".
        resume: skip the folds that are finished, and continue the one that was interrupted.

    Returns:
        The rows of `summary.csv`, see `summarise`; none in the other processes of torchrun.

    Raises:
        ConfigError, DataError, TrainingError: as `run_training`.
    """
    folds = run.members
    run.check(resume=resume)
    with (
        distributed.joined_processes()
    ):  # once for all folds: processes that rejoin for each fold miss each other
        first = distributed.is_writer()
        if first:
            run.start()
        for number, fold in enumerate(folds):
            if fold.finished.is_file():
                log.info(f"fold {number} of 0 to {len(folds) - 1}: finished already")
                continue
            log.info(f"fold {number} of 0 to {len(folds) - 1}")
            row = run_training(fold, resume=True)
            if first:
                with written_aside(fold.finished) as aside:
                    aside.write_text(json.dumps(row, indent=2) + "\n")
    return score_folds(run) if first else []


def evaluate_folds(run: Run, split: str) -> list[Row]:
    """Score the folds again: each on its held-out cases ("validation"), or the ensemble on another split.

    Raises:
        ConfigError: the split is "training": every case trained some of the folds.
        DataError, WeightsError: as `run_evaluation`.
    """
    if split == "training":
        raise ConfigError(
            "--split training: with all folds each case trains some and validates one; take validation, a "
            f"split that the cohort's list names, or one fold, such as {run.members[0].folder}"
        )
    if split != "validation":
        return summarise(run_evaluation(run, split), _subjects(run))
    for fold in run.members:
        run_evaluation(fold)
    return score_folds(run)


def score_folds(run: Run) -> list[Row]:
    """Join the validations of all folds: the out-of-fold scores.

    Writes into the run folder: `cases.csv` (every case once, by the fold that held it out), `summary.csv`,
    `report.html`, and which labels keep only their largest component, decided by all folds together.

    Returns:
        The rows of `summary.csv`, see `summarise`.
    """
    rows = [
        {"case": row.pop("case"), "fold": number, **row}
        for number, fold in enumerate(run.members)
        for row in read_table(fold.cases(), words=("case", "label"))
    ]
    write_table(run.cases(), rows)
    write_largest(run.largest, decide(rows))
    table = summarise(rows, _subjects(run))
    write_table(run.summary, table)
    folds = [
        {"fold": number, **summarise([row for row in rows if row["fold"] == number])[-1]}
        for number in range(len(run.members))
    ]
    title = f"All {table[-1]['cases']} cases, each scored by the fold that held it out"
    tables = {title: with_intervals(table), "Folds": with_intervals(folds), "Cases": rows}
    log.info(f"report: {write_report(run, tables)}")
    return table


def summarise(rows: Sequence[Row], subjects: dict[str, str] | None = None) -> list[Row]:
    """A row for each label and for their "mean": number of cases; mean and interval of each metric.

    Cases in which a label is neither in truth nor prediction do not count for it.

    Args:
        rows: one for each case and label.
        subjects: case -> its subject, whose cases are resampled together for the 95 % interval; a case
            without an entry is its own subject.
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
            means = {case: mean_of_present(values[case]) for case in cases}
            there = [case for case in cases if not math.isnan(means[case])]
            mean = low = high = math.nan
            if there:
                kept, subject_of = [means[case] for case in there], dict(zip(cases, groups, strict=True))
                units = [subject_of[case] for case in there]
                mean, low, high = mean_interval(kept, units, bounds=BOUNDS.get(metric, (0.0, 1.0)))
            if metric == METRICS[0]:
                summed["cases"] = len(there)
            summed |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
        table.append(summed)
    return table


def with_intervals(table: Sequence[Row]) -> list[Row]:
    """Rows of `summarise` with each interval in brackets after its mean, for display."""
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


def _subjects(run: Run) -> dict[str, str]:
    return {case.name: case.subject for case in read_cohort(run.volumes.root).cases}
