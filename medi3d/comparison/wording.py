"""The intervals of a comparison in words."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medi3d.comparison.findings import Finding


NO_SEEDS = "One seed: the intervals are over cases only, and another seed may turn any of this round."
MOST_NAMED = 8
"""The answer names at most this many arms, otherwise it gives their number."""


def answer(findings: Sequence["Finding"]) -> str:
    """How many comparisons found the arm better, worse or no different, and which arms these are."""
    if not findings:
        return "No arm can be compared with its reference yet."
    verdicts = Counter(finding.effect.verdict for finding in findings)
    better, worse, unseen = (verdicts[word] for word in ("better", "worse", "no difference seen"))
    if not better + worse:
        detectable = 100 * statistics.median(finding.effect.detectable for finding in findings)
        count = len(findings)
        none = (
            f"No difference seen in {'the one comparison' if count == 1 else f'any of {count} comparisons'}"
        )
        measure = findings[0].measure
        if detectable >= 100:
            return f"{none}; so few seeds and {measure.case}s cannot show one."
        return (
            f"{none}; one of {detectable:.1f} {measure.points} would have been seen in four of five "
            "repetitions."
        )
    if len(findings) == 1:
        (only,) = findings
        return f"The arm is {only.effect.verdict} than the reference: {points(only)} ({place(only)})."
    clear = [finding for finding in findings if finding.effect.verdict != "no difference seen"]
    largest = max(clear, key=lambda finding: abs(finding.effect.mean))
    parts = [f"better in {better}"] * bool(better) + [f"worse in {worse}"] * bool(worse)
    rest = f", and no difference was seen in {unseen}" if unseen else ""
    return (
        f"Of {_comparisons(len(findings))} with the reference, the arm was {' and '.join(parts)}{rest}; "
        f"the largest clear difference is {points(largest)} ({place(largest)}).{_named(clear)}"
    )


def _named(clear: Sequence["Finding"]) -> str:
    """The names of the arms, where they are few."""
    if not 1 < len(clear) <= MOST_NAMED:
        return ""
    parts = []
    for verdict in ("better", "worse"):
        names = [_name(finding) for finding in clear if finding.effect.verdict == verdict]
        parts += [f" {verdict.capitalize()}: {', '.join(names)}."] * bool(names)
    return "".join(parts)


def _name(finding: "Finding") -> str:
    point = finding.point
    where = [
        point.group,
        point.strategy,
        *([] if finding.over else [f"{finding.size} labels"]),
        point.budget,
    ]
    return f"{point.arm} ({', '.join(where)}) {100 * finding.effect.mean:+.1f}"


def points(finding: "Finding") -> str:
    """An effect with its interval, in hundredths of the score."""
    effect, unit = finding.effect, finding.measure.points
    return f"{100 * effect.mean:+.1f} {unit}, {100 * effect.low:+.1f} to {100 * effect.high:+.1f}"


def place(finding: "Finding") -> str:
    """The place of a finding in the grid."""
    point = finding.point
    return f"{point.group}: {point.arm}, {point.strategy}, {finding.size} labels, {point.budget}"


def speed(share: float) -> str:
    """A fraction of the reference's budget, such as "0.45 ×", or that the score was never reached."""
    return f"{share:.2f} ×" if math.isfinite(share) else "never"


def _comparisons(count: int) -> str:
    return f"{count} comparison{'s' * (count != 1)}"
