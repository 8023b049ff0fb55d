"""One run of a comparison: trained, scored, and marked as complete by a file that appears last."""

import csv
import json
import math
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medi3d.comparison.grid import Cell
from medi3d.engine.metrics import mean_of_present
from medi3d.errors import Medi3dError
from medi3d.evaluation.evaluate import summary
from medi3d.files import read_table, written_aside
from medi3d.training.train import run_training

RESULT = "result.json"
TEXTS = ("case", "label", "predicted")
"""Text columns in the table of case scores."""


@dataclass(frozen=True)
class Result:
    """The result of a complete run.

    Attributes:
        facts: content of its `result.json`.
        curve: rows of its `metrics.csv`.
        cases: rows of its table of case scores; columns in `TEXTS` are text, the others numbers.
    """

    facts: dict[str, Any]
    curve: list[dict[str, Any]]
    cases: list[dict[str, Any]]

    def scores(self, key: str) -> dict[str, float]:
        """Case -> its score in column `key`, averaged over its labels.

        A label that is neither in truth nor prediction leaves the average. Where none is left, all is right:
        the case scores 1, so that pairs of runs have the same cases and false findings count.
        """
        found: dict[str, list[float]] = {}
        for row in self.cases:
            found.setdefault(row["case"], []).append(row[key])
        means = {case: mean_of_present(values) for case, values in found.items()}
        return {case: 1.0 if math.isnan(mean) else mean for case, mean in means.items()}


def is_complete(cell: Cell, cells: Path) -> bool:
    """Whether the run of a cell is finished, in the folder of all cells."""
    try:
        facts = json.loads((cells / cell.id / RESULT).read_text())
        # Results from before version 0.2 do not know their contents.
        return (facts["digest"], facts.get("contents", cell.contents)) == (cell.digest, cell.contents)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def run_cell(cell: Cell, cells: Path) -> str | None:
    """Train and score, resuming an earlier attempt; a complete run is left alone.

    Returns:
        None, or one line that says why it failed.
    """
    if is_complete(cell, cells):
        return None
    run = cell.run(cells)
    if not run.last.is_file():
        run.best.unlink(missing_ok=True)  # of a run whose result was lost
    try:
        # The list of cases moves with the comparison; the cell's digest proves that it is the same list.
        last = run_training(run, resume=True, split=cell.split, moved=["data.root"])
    except Medi3dError as error:
        return " ".join(str(error).split())
    except Exception as error:  # the other runs continue; the traceback is kept
        run.traceback.write_text(traceback.format_exc())
        return f"{type(error).__name__}: {' '.join(str(error).split())} (traceback in {run.traceback})"
    facts = {
        "digest": cell.digest,
        "contents": cell.contents,
        "learning_rate": cell.experiment.training.learning_rate,
        "tuning_score": last["best"],
        **{key: last[key] for key in ("step", "wall_seconds", "cpu_seconds", "training_cpu_seconds")},
        **summary(_read_cases(run.cases(cell.split)))["mean"],
    }
    with written_aside(run.folder / RESULT) as aside:
        aside.write_text(json.dumps(facts, indent=1) + "\n")
    # The state to resume from is three quarters of a run's size, and a grid has hundreds of runs.
    run.last.unlink(missing_ok=True)
    return None


def read_result(cell: Cell, cells: Path) -> Result:
    """The result of a complete run."""
    run = cell.run(cells)
    facts = json.loads((run.folder / RESULT).read_text())
    return Result(facts, read_table(run.metrics), _read_cases(run.cases(cell.split)))


def _read_cases(path: Path) -> list[dict[str, Any]]:
    # Not by read_table, which would turn a case named 010 into the number 10.
    with path.open(newline="") as file:
        return [
            {name: cell if name in TEXTS else float(cell or "nan") for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]
