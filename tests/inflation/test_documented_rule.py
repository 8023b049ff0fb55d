"""The rule that docs/rules.md shows for a layer of the reader's own: it runs as printed."""

import re
from pathlib import Path

import pytest

from medi3d.inflation import inflate, rules
from medi3d.inflation.rules import base

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"


@pytest.fixture
def shown(monkeypatch):
    """Names that the example defines; its rule is forgotten afterwards."""
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], names)
    return names


def test_shown_rule_is_exact_and_mixes_slices(shown):
    row = shown["net3d"].report.layers[-1]
    assert (row.rule, row.kernel_3d) == ("ErodeRule", (3, 3, 3))


def test_without_the_rule_the_layer_stays_within_its_slice(shown, monkeypatch):
    monkeypatch.delitem(base._RULES, shown["Erode2d"])
    assert not inflate(shown["net2d"]).report.exactness.mixes_depth


def test_every_rule_on_the_page_exists(shown):
    named = set(re.findall(r"`(\w+Rule)`", PAGE.read_text()))
    assert len(named) > 10
    assert named <= {*rules.__all__, *shown}
