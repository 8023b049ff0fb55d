"""The quickstart on a cohort of a few coarse subjects: all steps, the second run, missing weights."""

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("nilearn")

from medi3d.cli import quickstart
from medi3d.comparison.cell import run_cell
from medi3d.comparison.config import load_comparison
from medi3d.datasets.cohorts.virtual_subjects import VirtualSettings
from medi3d.errors import WeightsError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    base["data"] |= {"root": str(tmp_path / "cohort"), "patch": [40, 40, 40], "validation": 1}
    base["network"]["levels"] = 2
    base["training"] |= {"batch_size": 1}
    base["prediction"]["window"] = [40, 40, 40]
    content = yaml.safe_load((ROOT / "configs" / "compare" / "quickstart.yaml").read_text())
    content |= {"base": base, "tuning_cases": 1, "budgets": {"short": {"steps": 2}}}
    del content["groups"]["i3d"]  # the weights of the other come as a package
    tiny = VirtualSettings(labelled=3, held_out=1, spacing=8)
    monkeypatch.setattr(quickstart, "VirtualSettings", lambda: tiny)
    path = tmp_path / "quickstart.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def refuse(*_: Any, **__: Any) -> None:
    raise WeightsError("no connection")


class InTurn:
    """An executor without processes, which counts what it is given."""

    trained = 0

    def __call__(self, cells: Any, folder: Path) -> Any:
        for cell in cells:
            InTurn.trained += 1
            yield cell, run_cell(cell, folder)


@pytest.mark.slow
def test_a_second_run_uses_what_is_there(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "LocalExecutor", InTurn)
    out = tmp_path / "runs"
    (row,) = quickstart.run_quickstart(config, out)
    assert (row["arm"], row["reference"], InTurn.trained) == ("imagenet", "scratch", 2)
    page = (out / "report.html").read_text()
    assert "VIRTUAL" in page
    assert "Proof of exactness" in page
    assert (
        page.count("A subject that no training has seen, by lite0") == 2 * 2
    )  # heading and text of the picture
    assert len(list((out / "masks").rglob("*.nii.gz"))) == 2
    assert str(out / "report.html") in capsys.readouterr().out.splitlines()[-1]

    (again,) = quickstart.run_quickstart(config, out)
    assert (again["dice"], again["effect"]) == (row["dice"], row["effect"])
    assert InTurn.trained == 2
    quickstart.run_quickstart(config, out, fresh=True)
    assert InTurn.trained == 4


def test_without_any_weights_it_says_so(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "find_weights", refuse)
    monkeypatch.setattr(quickstart, "fetch_weights", refuse)
    with pytest.raises(WeightsError, match="network"):
        quickstart.run_quickstart(config, tmp_path / "runs")
    assert "left out: lite0: no connection" in capsys.readouterr().out


def test_groups_without_weights_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, resolve = load_comparison(ROOT / "configs" / "compare" / "quickstart.yaml")
    monkeypatch.setattr(quickstart, "_has_weights", lambda name, _: name == "i3d")
    assert list(quickstart.with_weights(comparison, resolve).groups) == ["i3d"]
