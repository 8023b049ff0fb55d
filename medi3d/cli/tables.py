"""Tables that the commands print."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from medi3d.axes import to_pair
from medi3d.console import compact_table, console


def print_inflation(report: Any) -> None:
    """The table of layers, the proof per level, and one line of conclusion."""
    content = report.to_dict()
    _print_layers(content["layers"])
    unit, sizes = _unit(content["plan"]["spacing"], content["plan"]["fps"])
    table = Table(title="Levels", title_justify="left")
    for column in (
        "channels",
        "stride",
        "receptive field (voxels)",
        unit,
        "error",
        "error at the ends, own padding",
    ):
        table.add_column(column, justify="right")
    for level in content["levels"]:
        field = level["receptive_field_voxels"]
        table.add_row(
            str(level["channels"]),
            _by(level["stride"]),
            _by(field),
            _sized(field, sizes),
            f"{level['max_rel_error']:.1e}",
            f"{level['border_rel_error']:.1e}",
        )
    console.print(table)
    if content["weights"].get("name", "none") != "none":
        weights = content["weights"]
        console.print(f"weights {weights['name']}: {_pairs(weights.get('counts', {}))}")
        for line in [*weights.get("notes", []), *(f"licence: {x}" for x in weights.get("licences", []))]:
            console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
    print_verdict(report.exactness, report.exact_on)
    mixing = "slices are mixed"
    if not content["mixes_depth"]:
        mixing = "slices are NOT mixed: it has no 3D context"
        mixing += ", until training gives it some" if content["can_mix_depth"] else ""
    console.print(f"{content['parameters'] / 1e6:.2f} M parameters; {mixing}")


def print_proof(report: Any, exact_on: str) -> None:
    """One line per level and the conclusion."""
    for number, level in enumerate(report.levels):
        console.print(f"level {number}: {level.channels} channels, error {level.max_rel_error:.1e}")
    print_verdict(report, exact_on)


def print_verdict(proof: Any, exact_on: str) -> None:
    """Exact (on boring volumes, or on any volume), not exact, or inexact by design."""
    where = (
        f"worst error {proof.max_rel_error:.1e} in float64, "
        f"{proof.depth} slices of {'×'.join(map(str, to_pair(proof.size)))}; "
        f"the proof took {proof.seconds:.1f} s, {proof.forward_seconds:.1f} s of it in its two forwards"
    )
    if proof.exact:
        console.print(f"[bold green]exact[/]: the 3D network equals the 2D one on boring volumes ({where})")
        if exact_on == "any":
            console.print("and, with these weights, slice by slice on any volume: no layer mixes slices yet")
    elif exact_on == "never":
        console.print(
            f"[bold yellow]inexact by nature[/]: no 2D network equals this profile or its trained layers "
            f"along depth ({where})"
        )
    else:
        console.print(f"[bold red]NOT exact[/]: {proof.failure} ({where})")


def print_inspection(
    report: dict[str, Any], spacing: Sequence[float] | None = None, fps: float | None = None
) -> None:
    """Layers, levels, size and cost; without spacing and rate, the plan's own."""
    _print_layers(report["layers"])
    if not spacing and not fps:
        spacing, fps = report["plan"]["spacing"], report["plan"]["fps"]
    unit, sizes = _unit(spacing, fps)
    table = Table(title="Levels", title_justify="left")
    for column in ("channels", "stride", "receptive field (voxels)", unit):
        table.add_column(column, justify="right")
    for level in report["levels"]:
        field = level["receptive_field_voxels"]
        table.add_row(str(level["channels"]), _by(level["stride"]), _by(field), _sized(field, sizes))
    console.print(table)
    millions, cost = report["parameters"] / 1e6, report["multiply_adds"] / 1e9
    console.print(f"{millions:.2f} M parameters; {cost:.1f} G multiply-adds at {report['size']}³ voxels")


def print_classes(classes: Iterable[tuple[str, float]]) -> None:
    """Classes with their probabilities, best first."""
    table = Table("class", "probability")
    for name, probability in classes:
        table.add_row(name, f"{probability:.4f}")
    console.print(table)


def print_weights(rows: Iterable[Any]) -> None:
    """The catalogue."""
    from medi3d.errors import WeightsError
    from medi3d.weights.catalogue import find_weights

    table = Table()
    table.add_column("name", no_wrap=True)  # copied by users, so never cut
    for column in ("network", "licence", "here", "what"):
        table.add_column(column, overflow="fold")
    for row in rows:
        try:
            find_weights(row)
            here = "yes"
        except WeightsError:
            here = "-"
        network = f"{row.source}, {row.dimensions}D"
        table.add_row(row.name, network, row.licence, here, row.description)
    console.print(table)


def print_effects(results: Any) -> None:
    """A line for each finding, in hundredths of the score, and the conclusion."""
    _print_findings(
        f"Against the reference, {results.measure.points}", results.findings, results.measure.name
    )
    if results.overall:
        _print_findings("The same over all numbers of labels", results.overall, results.measure.name)
    console.print(results.answer, soft_wrap=True, highlight=False)


def _print_findings(title: str, findings: Sequence[Any], score: str) -> None:
    table = compact_table(title)
    table.add_column("arm")
    for column in (score, "diff.", "95 %", "verdict"):
        table.add_column(column, no_wrap=True)
    for finding in findings:
        point, effect = finding.point, finding.effect
        table.add_row(
            f"{point.group}: {point.arm}, {point.strategy}, {finding.size} labels, {point.budget}",
            f"{100 * finding.arm_score:.1f}",
            f"{100 * effect.mean:+.1f}",
            f"{100 * effect.low:+.1f} to {100 * effect.high:+.1f}",
            effect.verdict,
        )
    console.print(table)


def _print_layers(layers: Sequence[dict[str, Any]]) -> None:
    table = compact_table("Layers: kernel in 2D and 3D, stride, padding along depth")
    table.add_column("layer", no_wrap=True)  # plan overrides refer to it: never cut
    for column in ("2D", "3D", "stride", "padding", "rule"):
        table.add_column(column, overflow="fold")
    for layer in layers:
        table.add_row(
            layer["name"],
            _by(layer["kernel_2d"]),
            _by([taps or "all" for taps in layer["kernel_3d"]]),  # 0: attention over all slices
            _by(layer["stride_3d"]),
            layer["padding"],
            layer["rule"].removesuffix("Rule"),
        )
    console.print(table)


def _by(numbers: Sequence[int | str]) -> str:
    return "×".join(str(n) for n in numbers)


def _unit(spacing: Sequence[float] | None, fps: float | None) -> tuple[str, Sequence[float]]:
    """Heading and voxel size in that unit: mm along each axis, or ms along time only."""
    if fps:
        return "(ms)", [1000 / fps]
    return "(mm)", spacing or ()


def _sized(field: Sequence[int], sizes: Sequence[float]) -> str:
    return _by([round(f * s) for f, s in zip(field, sizes, strict=False)]) if sizes else "-"


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
