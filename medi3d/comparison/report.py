"""A comparison on one page: the answer first, then the evidence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medi3d.comparison.figures import plot_effects, plot_label_curves, plot_scatter, plot_training_curves
from medi3d.comparison.findings import Finding
from medi3d.comparison.network_figures import (
    Trained,
    load_pair,
    plot_cases,
    plot_confusions,
    plot_drift,
    plot_filters,
)
from medi3d.comparison.results import Results
from medi3d.comparison.wording import NO_SEEDS, place, speed
from medi3d.engine.log import log
from medi3d.errors import Medi3dError
from medi3d.experiment.run import CONFIG, ENVIRONMENT, PLOTS, REPORT
from medi3d.reports.page import write_page

VERDICT_STYLES = {"better": "better", "worse": "worse", "no difference seen": "unseen"}


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    title: str
    path: Path
    caption: str


def write_comparison(
    results: Results,
    folder: Path,
    *,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    pictures: Sequence[Picture] = (),
) -> Path:
    """Write `report.html`, with its figures in `plots`.

    Args:
        results: of the comparison.
        folder: of the comparison, with its config and environment.
        tables: title -> rows, shown after the figures.
        pictures: more figures.
    """
    comparison = results.grid.comparison
    return write_page(
        folder / REPORT,
        "comparison.html",
        name=comparison.name,
        notice=comparison.notice,
        answer=results.answer,
        cautions=_cautions(results),
        measure=results.measure,
        overall=[_effect_row(finding) for finding in results.overall],
        effects=[_effect_row(finding) for finding in results.findings],
        figures=[*_figures(results, folder / PLOTS), *pictures],
        tables=tables or {},
        terms=terms(results),
        failed=results.failed,
        config=(folder / CONFIG).read_text(),
        environment=(folder / ENVIRONMENT).read_text(),
    )


def _figures(results: Results, plots: Path) -> list[Picture]:
    if not results.findings:
        return []
    measure, cases = results.measure, f"{results.measure.case}s"
    shown = max(results.findings, key=lambda finding: abs(finding.effect.mean))
    figures = [
        Picture(
            "Differences",
            plot_effects(results, plots / "effects.svg"),
            "Each arm against its reference; diamonds: over all training-set sizes. "
            "Green: better, red: worse, grey: no difference seen.",
        ),
        Picture(
            f"{measure.name} and training-set size",
            plot_label_curves(results, plots / "labels.svg"),
            f"On the {cases} that no training saw; mean over seeds and {cases}, bars: deviation of seeds.",
        ),
        Picture(
            "Training, by steps",
            plot_training_curves(results, plots / "steps.svg", "step", "steps"),
            f"On the tuning {cases}, at the smallest training-set size; a line for each seed and fold.",
        ),
        Picture(
            "Training, by compute",
            plot_training_curves(results, plots / "compute.svg", "training_cpu_seconds", "CPU s of training"),
            "The same over processor seconds, reading and validation apart.",
        ),
        Picture(
            "Case by case",
            plot_scatter(results, plots / "scatter.svg"),
            f"{measure.name} of each {measure.case}, mean over seeds: above the line the arm is better. "
            "Smallest training-set size.",
        ),
    ]
    try:
        pair = load_pair(results, shown)
    except Medi3dError as error:  # the weights may have been removed since the runs
        return [*figures, *_without_networks(error)]
    where = f"{place(shown)}, against {shown.reference.arm}; first seed."
    return [
        *figures,
        _picture_of_cases(results, pair, plots, where),
        Picture(
            "First filters, before and after training",
            plot_filters(pair, plots / "filters.png"),
            f"Middle slice of the strongest filters, each in its own grey scale. {where}",
        ),
        Picture(
            "How far training moved the encoder",
            plot_drift(pair, plots / "drift.svg"),
            f"Left: features of one evaluation {measure.case}, level by level. Right: running means of the "
            f"batch norms, in their own deviations. {where}",
        ),
    ]


def _picture_of_cases(results: Results, pair: tuple[Trained, Trained], plots: Path, where: str) -> Picture:
    if results.grid.base.task == "classification":
        path = plot_confusions(results, pair, plots / "confusion.png")
        return Picture("Which class was taken for which", path, f"Over all folds. {where}")
    path = plot_cases(results, pair, plots / "cases.png")
    return Picture("Best, median and worst case", path, f"Reference green, prediction red. {where}")


def _without_networks(error: Medi3dError) -> list[Picture]:
    log.warning(f"report without pictures of the networks: {error}")
    return []


def _effect_row(finding: Finding) -> dict[str, Any]:
    point, effect = finding.point, finding.effect
    by_spread = effect.mean / finding.seed_spread if finding.seed_spread else math.nan
    return {
        "group": point.group,
        "arm": point.arm,
        "strategy": point.strategy,
        "labels": finding.size,
        "budget": point.budget,
        "score": f"{100 * finding.arm_score:.1f}",
        "reference": f"{100 * finding.reference_score:.1f}",
        "difference": f"{100 * effect.mean:+.1f}",
        "interval": f"{100 * effect.low:+.1f} to {100 * effect.high:+.1f}",
        "verdict": effect.verdict,
        "style": VERDICT_STYLES[effect.verdict],
        "p": f"{finding.p_holm:.2g}",
        "spread": "-" if math.isnan(by_spread) else f"{by_spread:+.1f}",
        "detectable": f"{100 * effect.detectable:.1f}",
        "steps": speed(finding.speed["steps"]),
        "cpu": speed(finding.speed["cpu_seconds"]),
    }


def _cautions(results: Results) -> list[str]:
    lines = []
    if any(finding.effect.seeds == 1 for finding in results.findings):
        lines.append(NO_SEEDS)
    missing = len(results.cells) - len(results.done)
    if missing:
        lines.append(f"{missing} of {len(results.cells)} runs are missing; what rests on them is left out.")
    return lines


def terms(results: Results) -> list[str]:
    """What was equal, what was held out, how learning rates were chosen: a line each."""
    comparison, grid = results.grid.comparison, results.grid
    parts = next(iter(results.cells.values())).parts
    measure, cases = results.measure, f"{results.measure.case}s"
    where = f"in each of {comparison.folds} folds" if comparison.folds > 1 else "the same for all runs"
    lines = [
        f"{len(parts.evaluation)} {cases} are held out for scoring, {where}; nothing else uses them.",
        f"{len(parts.tuning)} further labelled {cases} choose the checkpoint of each run and detect its "
        "plateau; the training-set size does not count them.",
        f"Seeds {', '.join(map(str, comparison.seeds))}: each draws the training {cases} (nested), "
        f"the {measure.head}'s first weights, the order and augmentation of samples, alike for arm and "
        "reference.",
        *_units_line(results),
        *(f"Budget {name}: {describe_budget(grid, name)}." for name in comparison.budgets),
        _rates_line(results),
        f"Each run has {comparison.threads} thread{'s' * (comparison.threads > 1)}.",
    ]
    references = {name: group.reference for name, group in comparison.groups.items()}
    return [*lines, *(f"Reference of {name}: {arm}." for name, arm in references.items())]


def describe_budget(grid: Any, name: str) -> str:
    """What ends a training of this budget."""
    training = grid.resolve([grid.comparison.changes, {"training": grid.comparison.budgets[name]}]).training
    if training.schedule == "plateau":
        return (
            f"until {training.patience} validations, {training.validate_every} steps apart, bring no gain "
            f"above {training.min_gain:g}, then a falling learning rate; at most {training.steps} steps"
        )
    for unit, words in (("cpu_seconds", "processor"), ("gpu_seconds", "GPU")):
        if getattr(training, unit):
            return f"{getattr(training, unit):g} {words} seconds of training, equal for all arms"
    return f"{training.steps} steps, equal for all arms"


def _units_line(results: Results) -> list[str]:
    measure, units = results.measure, results.grid.subjects
    if len(set(units.values())) == len(units):
        return []
    return [
        f"Intervals and p-values draw whole {measure.unit}s, {len(set(units.values()))} of them, not single "
        f"{measure.case}s: those of one {measure.unit} are near-duplicates, and are never in two parts."
    ]


def _rates_line(results: Results) -> str:
    search = results.grid.comparison.search
    if not search.rates:
        return (
            f"Learning rate {results.grid.base.training.learning_rate:g}, shared, unless an arm sets its own."
        )
    chosen = "; ".join(f"{' '.join(series)} {rate:g}" for series, rate in results.rates.items())
    rates = ", ".join(f"{rate:g}" for rate in search.rates)
    return f"Learning rates tuned by the same search of {rates} for each arm, on the tuning cases: {chosen}."
