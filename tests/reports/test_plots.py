"""Pictures are written whole, for cases with and without labels."""

import numpy as np
import pytest

from medi3d.reports.plots import plot_confusion, plot_curves, plot_overlay, plot_pretext

pytestmark = pytest.mark.figures

PNG = b"\x89PNG"


@pytest.mark.parametrize("labelled", [True, False])
def test_an_overlay_is_drawn_even_where_nothing_is_labelled(tmp_path, labelled):
    label = np.zeros((6, 8, 10), np.uint8)
    if labelled:
        label[2:4, 3:6, 4:7] = 2
    plot_overlay(np.random.rand(6, 8, 10), label, label, (3.0, 1.0, 1.0), "case", tmp_path / "o.png")  # noqa: NPY002
    assert (tmp_path / "o.png").read_bytes()[:4] == PNG
    assert [path.name for path in tmp_path.iterdir()] == ["o.png"]


@pytest.mark.parametrize("shape", [(1, 9, 7), (9, 1, 7), (9, 7, 1), (2, 9, 7), (1, 1, 7)], ids=str)
def test_an_overlay_of_a_very_thin_volume_is_drawn(shape, tmp_path, caplog):
    label = np.ones(shape, np.uint8)
    plot_overlay(np.zeros(shape), label, label, (3.0, 1.0, 1.0), "thin", tmp_path / "o.png")
    assert (tmp_path / "o.png").read_bytes()[:4] == PNG
    assert not caplog.text


def test_a_picture_that_fails_is_a_line_in_the_log(tmp_path, caplog):
    (tmp_path / "file").touch()
    plot_curves([], "dice", tmp_path / "c.png")
    plot_confusion([("a", "a")], ["a"], tmp_path / "file" / "m.png")
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "no picture (plot_curves)",
        "no picture (plot_confusion)",
    ]
    assert "\n" not in "".join(record.message for record in caplog.records)


def test_curves_confusion_and_pretext_are_drawn(tmp_path):
    rows = [{"step": step, "train_loss": 1.0, "val_loss": 1.0, "dice": 0.5, "dice_a": 0.5} for step in (1, 2)]
    plot_curves(rows, "dice", tmp_path / "c.png")
    plot_confusion([("a", "b"), ("a", "a")], ["a", "b"], tmp_path / "m.png")
    shown = np.linspace(-1, 1, 4 * 5 * 6).reshape(4, 5, 6)
    plot_pretext([(shown, shown, shown)] * 2, tmp_path / "p.png")
    assert all(path.read_bytes()[:4] == PNG for path in tmp_path.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"c.png", "m.png", "p.png"}
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())
