"""One run of a comparison: trained, judged, and marked as complete by a file that appears last."""

import csv
import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medi3d.comparison.grid import Cell
from medi3d.errors import Medi3dError
from medi3d.evaluation.evaluate import summary
from medi3d.files import read_table, written_aside
from medi3d.training.train import run_training

RESULT = "result.json"
TEXTS = ("case", "label", "predicted")
"""Columns of the table of judged cases that are no numbers."""


@dataclass(frozen=True)
class Result:
    """What a complete run came to.

    Attributes:
        facts: content of its `result.json`.
        curve: rows of its `metrics.csv`.
        cases: rows of its table of judged cases; those of `TEXTS` are texts, the others numbers.
    """

    facts: dict[str, Any]
    curve: list[dict[str, Any]]
    cases: list[dict[str, Any]]

    def scores(self, key: str) -> dict[str, float]:
        """Case -> its score in column `key`, mean over its labels where it has several."""
        found: dict[str, list[float]] = {}
        for row in self.cases:
            found.setdefault(row["case"], []).append(row[key])
        return {case: sum(values) / len(values) for case, values in found.items()}


def is_complete(cell: Cell, folder: Path) -> bool:
    """Whether the run in `folder` is this one, finished."""
    try:
        return json.loads((folder / RESULT).read_text())["digest"] == cell.digest
    except (OSError, ValueError, KeyError):
        return False


def run_cell(cell: Cell, folder: Path) -> str | None:
    """Train and judge, going on from where an earlier attempt stopped; a complete run is left alone.

    Returns:
        None, or in one line why it cannot be done.
    """
    if is_complete(cell, folder):
        return None
    try:
        last = run_training(cell.experiment, folder, resume=True, split=cell.split)
    except Medi3dError as error:
        return " ".join(str(error).split())
    except Exception as error:  # the other runs go on; the traceback is kept
        (folder / "error.txt").write_text(traceback.format_exc())
        return f"{type(error).__name__}: {' '.join(str(error).split())} (traceback in {folder / 'error.txt'})"
    facts = {
        "digest": cell.digest,
        "learning_rate": cell.experiment.training.learning_rate,
        "tuning_score": last["best"],
        **{key: last[key] for key in ("step", "wall_seconds", "cpu_seconds", "training_cpu_seconds")},
        **summary(_read_cases(folder / cases_table(cell.split)))["mean"],
    }
    with written_aside(folder / RESULT) as aside:
        aside.write_text(json.dumps(facts, indent=1) + "\n")
    # What a run would go on from is three quarters of its size, and a grid has hundreds of runs.
    (folder / "checkpoints" / "last.pt").unlink(missing_ok=True)
    return None


def read_result(cell: Cell, folder: Path) -> Result:
    """The result of a complete run."""
    facts = json.loads((folder / RESULT).read_text())
    cases = _read_cases(folder / cases_table(cell.split))
    return Result(facts, read_table(folder / "metrics.csv"), cases)


def cases_table(split: str) -> str:
    """Name of the table that `run_evaluation` writes for a split."""
    return "cases.csv" if split == "validation" else f"cases_{split}.csv"


def _read_cases(path: Path) -> list[dict[str, Any]]:
    # Not by read_table: a case named 010 is not the number ten.
    with path.open(newline="") as file:
        return [
            {name: cell if name in TEXTS else float(cell or "nan") for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]
