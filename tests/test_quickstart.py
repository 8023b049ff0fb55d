"""The quickstart on a cohort of three coarse subjects: all steps, the second run, missing weights."""

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("nilearn")

from medi3d import quickstart
from medi3d.datasets.synthetic import VirtualSettings
from medi3d.errors import WeightsError

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    content = yaml.safe_load(CONFIG.read_text())
    content["data"] |= {"root": str(tmp_path / "cohort"), "patch": [40, 40, 40], "validation": 1}
    content["network"]["levels"] = 2
    content["training"] |= {"steps": 2, "batch_size": 1}
    content["prediction"]["window"] = [40, 40, 40]
    tiny = VirtualSettings(labelled=2, held_out=1, spacing=8)
    monkeypatch.setattr(quickstart, "VirtualSettings", lambda: tiny)
    monkeypatch.setattr(quickstart, "CONTENDERS", quickstart.CONTENDERS[:1])  # its weights come as a package
    path = tmp_path / "quickstart.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def refuse(*_: Any, **__: Any) -> None:
    raise WeightsError("no connection")


@pytest.mark.slow
def test_a_second_run_uses_what_is_there(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    (row,) = quickstart.run_quickstart(config, out)
    assert 0 <= row["pretrained"] <= 1
    assert 0 <= row["scratch"] <= 1
    page = (out / "report.html").read_text()
    assert "VIRTUAL" in page
    assert page.count("data:image/png") == 3  # curves and two masks
    assert len(list((out / "masks").rglob("*.nii.gz"))) == 2
    assert str(out / "report.html") in capsys.readouterr().out.splitlines()[-1]

    monkeypatch.setattr(quickstart, "run_training", refuse)
    assert quickstart.run_quickstart(config, out) == [row]
    with pytest.raises(WeightsError):  # --fresh does train
        quickstart.run_quickstart(config, out, fresh=True)


def test_without_any_weights_it_says_so(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "find_weights", refuse)
    monkeypatch.setattr(quickstart, "fetch_weights", refuse)
    with pytest.raises(WeightsError, match="network"):
        quickstart.run_quickstart(config, tmp_path / "runs")
    assert "left out: EfficientNet-Lite0 (ImageNet): no connection" in capsys.readouterr().out
