"""A stand-in for the drawing of figures, which takes half of the time of a tiny training."""

import base64
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

MARK = "figures"
"""Marker of the tests that look at figures: theirs are drawn."""

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
EMPTY = {"png": PIXEL, "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>\n'}

_draw = Figure.savefig
_drawn = False


def _save(figure: Figure, path: Path, **options: Any) -> None:
    """As `Figure.savefig`, but the picture is a single pixel unless the test at work has the marker."""
    if _drawn:
        _draw(figure, path, **options)
    else:
        Path(path).write_bytes(EMPTY[options["format"]])


def draw_only_where_looked_at(item: pytest.Item) -> None:
    """Called before each test, and before its fixtures."""
    global _drawn
    _drawn = item.get_closest_marker(MARK) is not None
    Figure.savefig = _save  # type: ignore[method-assign]
