"""Files that are whole or absent, tables that go on, and progress with and without a terminal."""

import io

import pytest
from rich.console import Console

from medi3d.engine import handlers, log
from medi3d.engine.clock import Clock
from medi3d.engine.handlers import MetricsTable
from medi3d.engine.state import read_checkpoint
from medi3d.errors import WeightsError
from medi3d.files import read_table, write_table, written_aside


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way():
        with written_aside(path) as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_keeps_its_values(tmp_path):
    rows = [{"name": "a", "step": 1, "dice": 0.25}, {"name": "b", "step": 2, "dice": 1e-7}]
    write_table(tmp_path / "t.csv", rows)
    assert read_table(tmp_path / "t.csv") == rows
    assert read_table(tmp_path / "none.csv") == []


def test_a_resumed_table_drops_the_rows_after_the_checkpoint(tmp_path):
    write_table(tmp_path / "t.csv", [{"step": step} for step in (5, 10, 15)])
    assert MetricsTable(tmp_path / "t.csv", 10).rows == [{"step": 5}, {"step": 10}]


def test_a_clock_goes_on_from_a_reading():
    clock = Clock()
    clock.go_on_from({"wall_seconds": 100.0, "cpu_seconds": 50.0})
    reading = clock.read()
    assert 100 <= reading["wall_seconds"] < 110
    assert 50 <= reading["cpu_seconds"] < 60


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such checkpoint"), (b"", "damaged"), (b"PK\x03\x04 half", "damaged")],
    ids=["missing", "empty", "damaged"],
)
def test_a_checkpoint_that_cannot_be_read_is_one_line(tmp_path, content, message):
    path = tmp_path / "last.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_progress_speaks_where_it_is(tmp_path, monkeypatch, terminal):
    from tests.engine.test_training import SETTINGS, progress_of

    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    monkeypatch.setattr(log, "screen", console)
    monkeypatch.setattr(handlers, "screen", console)
    monkeypatch.setattr(handlers.TrainingProgress, "seconds_between_lines", 0.0)
    with log.shown_log(tmp_path / "log.txt"):
        progress_of(SETTINGS)
    assert "validation loss" in (tmp_path / "log.txt").read_text()
    assert "dice" in shown.getvalue()
    assert ("training" in shown.getvalue()) == terminal
    assert ("s left" in shown.getvalue()) != terminal
