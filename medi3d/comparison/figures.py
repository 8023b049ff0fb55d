"""Figures of a comparison drawn from its tables."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medi3d.comparison.findings import Finding
from medi3d.comparison.grid import Point
from medi3d.comparison.results import Results
from medi3d.reports.plots import save_figure

LINE_STYLES = {"full": "-", "fixed": "--", "original": "-"}
VERDICTS = {"better": "#116329", "worse": "#a40e26", "no difference seen": "#6e7781"}
MOST_PANELS = 8
MOST_COLUMNS = 3


def plot_effects(results: Results, path: Path) -> Path:
    """Every finding with its interval, in hundredths, coloured by its verdict; means over sizes on top."""
    findings = [*results.overall, *results.findings]
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(findings)), layout="constrained")
    axes = figure.subplots()
    for row, finding in enumerate(findings):
        effect, colour = finding.effect, VERDICTS[finding.effect.verdict]
        axes.plot([100 * effect.low, 100 * effect.high], [row, row], color=colour, linewidth=2)
        axes.plot(100 * effect.mean, row, "D" if finding.over else "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(findings)), [_words(finding) for finding in findings])
    axes.set_ylim(len(findings) - 0.5, -0.5)
    axes.set_xlabel(f"difference to the reference, {results.measure.points} (95 % interval)")
    axes.grid(axis="x", alpha=0.3)
    return save_figure(figure, path)


def plot_label_curves(results: Results, path: Path) -> Path:
    """Score over the number of training cases: mean over seeds and cases, bars are the deviation of seeds."""

    def draw(axes: Axes, points: Sequence[Point]) -> None:
        counts = sorted({point.size for point in points}, key=lambda count: count or 10**9)
        places = {count: place for place, count in enumerate(counts)}
        for series, same in _by_series(points).items():
            means = {p.size: 100 * _seed_means(results, p) for p in same if results.complete_seeds(p)}
            if not means:
                continue
            centre = [values.mean() for values in means.values()]
            spread = [values.std(ddof=1) if len(values) > 1 else 0 for values in means.values()]
            at = [places[count] for count in means]
            axes.errorbar(at, centre, spread, **_look(results, same[0]), marker="o", capsize=3, label=series)
        axes.set_xticks(range(len(counts)), [str(count or "all") for count in counts])
        axes.set_xlabel(f"labelled training {results.measure.case}s")
        axes.set_ylabel(results.measure.axis)

    return _panels(results, draw, path)


def plot_training_curves(results: Results, path: Path, unit: str, words: str) -> Path:
    """Score on the tuning cases over `unit` of the budget, at the smallest size; a line for each seed."""

    def draw(axes: Axes, points: Sequence[Point]) -> None:
        fewest = min(points, key=lambda point: point.size or 10**9).size
        for series, same in _by_series([p for p in points if p.size == fewest]).items():
            label: str | None = series
            for point, result in results.done.items():
                if replace(point, seed=0, fold=0) in same:
                    look = _look(results, point)
                    scores = [100 * row[results.measure.key] for row in result.curve]
                    at = [row[unit] for row in result.curve]
                    marker = "" if len(at) > 1 else "o"  # a single validation makes no line
                    axes.plot(at, scores, **look, marker=marker, alpha=0.7, label=label)
                    label = None
        axes.set_xlabel(f"{words} ({fewest or 'all'} labels)")
        axes.set_ylabel(f"{results.measure.axis}, tuning {results.measure.case}s")

    return _panels(results, draw, path)


def plot_scatter(results: Results, path: Path) -> Path:
    """Score of each case, mean over seeds: reference on x, arm on y; each arm at its smallest size."""
    chosen: dict[tuple, Finding] = {}
    for finding in results.findings:
        point = finding.point
        chosen.setdefault((point.group, point.budget, point.arm, point.strategy), finding)
    findings = list(chosen.values())[:MOST_PANELS]
    columns = min(4, len(findings))
    rows = -(-len(findings) // columns)
    figure = Figure(figsize=(max(4, 2.9 * columns), 3.1 * rows), layout="constrained")
    for axes, finding in zip(figure.subplots(rows, columns, squeeze=False).flat, findings, strict=False):
        seeds = results.complete_seeds(finding.point)
        seeds = [seed for seed in seeds if seed in results.complete_seeds(finding.reference)]
        across = 100 * results.score_table(finding.reference, seeds)[0].mean(axis=0)
        upwards = 100 * results.score_table(finding.point, seeds)[0].mean(axis=0)
        low, high = min(across.min(), upwards.min()), max(across.max(), upwards.max())
        axes.plot([low, high], [low, high], color="black", linewidth=0.8)
        axes.plot(across, upwards, "o", markersize=4, alpha=0.7)
        point = finding.point
        axes.set_title(f"{point.arm}, {point.strategy}\n{finding.size} labels, {point.budget}", size=9)
        axes.set_xlabel(finding.reference.arm)
        axes.set_aspect("equal")
    return save_figure(figure, path)


def _panels(results: Results, draw: Callable[[Axes, Sequence[Point]], None], path: Path) -> Path:
    """A panel for each budget of each group that has a run."""
    comparison = results.grid.comparison
    by_place: dict[tuple[str, str], list[Point]] = {}
    for point in dict.fromkeys(replace(point, seed=0, fold=0) for point in results.done):
        by_place.setdefault((point.group, point.budget), []).append(point)
    places = [place for place in product(comparison.groups, comparison.budgets) if place in by_place]
    columns = min(MOST_COLUMNS, len(places))
    rows = -(-len(places) // columns)
    figure = Figure(figsize=(max(6, 4.6 * columns), 3.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (group, budget) in zip(panels, places, strict=False):
        draw(axes, by_place[group, budget])
        axes.set_title(f"{group}, {budget}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in panels[len(places) :]:
        axes.set_axis_off()
    return save_figure(figure, path)


def _by_series(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Arm and strategy -> their points, by training-set size."""
    found: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.size or 10**9):
        found.setdefault(f"{point.arm}, {point.strategy}", []).append(point)
    return dict(sorted(found.items()))


def _seed_means(results: Results, point: Point) -> np.ndarray:
    return results.score_table(point, results.complete_seeds(point))[0].mean(axis=1)


def _look(results: Results, point: Point) -> dict[str, Any]:
    arms = list(results.grid.comparison.groups[point.group].arms)
    return {"color": f"C{arms.index(point.arm)}", "linestyle": LINE_STYLES[point.strategy]}


def _words(finding: Finding) -> str:
    point = finding.point
    return f"{point.group}: {point.arm}, {point.strategy}, n = {finding.size}, {point.budget}"
