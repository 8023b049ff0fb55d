"""A comparison from its config to its report: train the grid, collect results, test differences, report."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from medi3d.comparison.cell import is_complete, read_result
from medi3d.comparison.executor import Executor
from medi3d.comparison.grid import Cell, Grid, Point, Rates, Resolve
from medi3d.comparison.report import write_comparison
from medi3d.comparison.results import Results, write_results
from medi3d.comparison.settings import Comparison
from medi3d.engine.log import screen
from medi3d.errors import ConfigError
from medi3d.experiment.run import start_folder
from medi3d.files import alone_in


def run_comparison(
    comparison: Comparison,
    resolve: Resolve,
    folder: Path,
    executor: Executor,
    *,
    resume: bool = False,
    report: Callable[[Results, Path], object] = write_comparison,
) -> Results:
    """Run the missing cells of a grid, then write tables and report.

    Args:
        comparison: what to compare.
        resolve: parts of a config -> experiment, from `load_comparison`.
        folder: of the comparison.
        executor: computes runs.
        resume: continue the comparison in `folder`; its grid may have grown.
        report: writes the report, given the results and `folder`.

    Returns:
        The results; `failed` names the runs that failed.

    Raises:
        ConfigError: the grid is contradictory, `folder` holds a comparison already and `resume` is false, or
            another process is working in it.
        DataError: the cohort is damaged, or `folder` cannot be written.
    """
    grid = Grid(comparison, resolve, folder)
    cells_folder = folder / "cells"
    if cells_folder.is_dir() and any(cells_folder.iterdir()) and not resume:
        raise ConfigError(
            f"{folder}: holds a comparison already; resume it with --resume, or choose another name"
        )
    with alone_in(folder, "running this comparison"):
        base = OmegaConf.to_container(OmegaConf.structured(grid.base))
        start_folder(folder, asdict(comparison) | {"base": base})
        searched, failed = _search(grid, cells_folder, executor)
        rates = best_rates(searched)
        cells = grid.cells(rates)
        failed |= _compute(cells.values(), cells_folder, executor, "runs")
        results = gather(grid, cells, rates, failed)
        write_results(results, folder)
        report(results, folder)
    return results


def _search(
    grid: Grid, folder: Path, executor: Executor
) -> tuple[dict[tuple[Point, float], float], dict[str, str]]:
    """(Point, learning rate) -> score on the tuning cases; and the failed runs."""
    cells = grid.search_cells()
    failed = _compute(cells.values(), folder, executor, "search for learning rates")
    done = {key: cell for key, cell in cells.items() if cell.id not in failed}
    return {k: read_result(cell, folder).facts["tuning_score"] for k, cell in done.items()}, failed


def best_rates(searched: Mapping[tuple[Point, float], float]) -> Rates:
    """The learning rate with the highest score for each arm and strategy; the lower one wins a tie."""
    best: dict[tuple[str, str, str], tuple[float, float]] = {}
    for (point, rate), score in searched.items():
        best[point.series] = max(best.get(point.series, (-1.0, 0.0)), (score, -rate))
    return {series: -rate for series, (_, rate) in best.items()}


def gather(grid: Grid, cells: Mapping[Point, Cell], rates: Rates, failed: Mapping[str, str]) -> Results:
    """The results of all complete runs of a grid."""
    folder = grid.folder / "cells"
    read = {cell.digest: cell for cell in cells.values() if is_complete(cell, folder)}
    results = {digest: read_result(cell, folder) for digest, cell in read.items()}
    done = {point: results[cell.digest] for point, cell in cells.items() if cell.digest in results}
    return Results(grid, dict(cells), done, dict(rates), dict(failed))


def _compute(cells: Iterable[Cell], folder: Path, executor: Executor, title: str) -> dict[str, str]:
    """Run the incomplete cells; returns id -> reason for those that failed."""
    unique = list({cell.digest: cell for cell in cells}.values())
    waiting = [cell for cell in unique if not is_complete(cell, folder)]
    if not waiting:
        return {}
    for cell in waiting:
        cell.parts.write(Path(cell.experiment.data.root))
    failed = {}
    with _progress(title, len(unique), len(unique) - len(waiting)) as advance:
        for cell, error in executor(waiting, folder):
            if error is not None:
                failed[cell.id] = error
            advance(cell, error)
    return failed


@contextmanager
def _progress(title: str, total: int, done: int) -> Iterator[Any]:
    """A progress bar with the time left; without a terminal, a line for each finished run."""
    begun, first = time.monotonic(), done
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)

        def advance(cell: Cell, error: str | None) -> None:
            nonlocal done
            done += 1
            left = (time.monotonic() - begun) / (done - first) * (total - done)
            words = f"about {_duration(left)} left"
            bar.update(task, completed=done, description=words)
            if error is not None or not screen.is_terminal:
                outcome = f"FAILED: {error}" if error else "done"
                screen.print(f"{done}/{total} {cell.id} {outcome}; {words}", soft_wrap=True, highlight=False)

        yield advance


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
