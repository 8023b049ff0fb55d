"""A run finds its cohort again, whatever the working folder is."""

from pathlib import Path

from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run
from tests.tiny import CONFIG


def test_a_relative_root_is_kept_whole_and_still_the_same_run(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("config.yaml").write_text(CONFIG.format(root="../cohort"))
    run = Run(Path("run"), load_config("config.yaml"))
    run.start()
    run.last.touch()
    run.check(resume=True)
    monkeypatch.chdir("/")
    root = Path(Run.open(tmp_path / "work/run").volumes.root)
    assert root.is_absolute()
    assert root.resolve() == tmp_path / "cohort"
