"""A run folder as a value: where its files are, what may be resumed, and that its config runs nothing."""

from dataclasses import replace

import pytest

from medi3d.errors import ConfigError
from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run, plan_file


@pytest.fixture
def run(config, tmp_path):
    made = Run(tmp_path / "run", load_config(config))
    made.start()
    return made


def test_it_opens_wherever_it_is(run, tmp_path):
    moved = tmp_path / "else" / "where"
    moved.parent.mkdir()
    run.folder.rename(moved)
    opened = Run.open(moved)
    assert opened.experiment == run.experiment
    assert opened.best == moved / "checkpoints" / "best.pt"
    assert opened.cases("test").name == "cases_test.csv"


def test_members_are_the_folds(config, tmp_path):
    run = Run(tmp_path / "run", load_config(config, ["data.folds=3", "data.fold=all"]))
    assert [one.folder.name for one in run.members] == ["fold0", "fold1", "fold2"]
    assert [one.experiment.data.fold for one in run.members] == [0, 1, 2]
    assert Run(tmp_path, load_config(config)).members == (Run(tmp_path, load_config(config)),)


@pytest.mark.parametrize("resume", [False, True], ids=["", "resume"])
def test_a_trained_network_without_its_checkpoint_is_not_replaced(run, resume):
    run.best.touch()
    with pytest.raises(ConfigError, match=r"no last\.pt to resume from" if resume else "holds a run already"):
        run.check(resume=resume)


def test_finished_folds_are_not_taken_for_those_of_another_config(config, tmp_path):
    folds = ["data.folds=2", "data.fold=all"]
    run = Run(tmp_path / "run", load_config(config, folds))
    run.start()
    run.members[1].folder.mkdir()
    run.members[1].finished.touch()
    with pytest.raises(ConfigError, match="holds a run already"):
        run.check(resume=False)
    other = Run(run.folder, load_config(config, [*folds, "training.learning_rate=0.5"]))
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.01, not 0\.5"):
        other.check(resume=True)
    run.check(resume=True)


@pytest.mark.parametrize("key", ["training.workers=2", "training.cache_gb=1.0"])
def test_keys_without_effect_may_change(run, config, key):
    run.last.touch()
    Run(run.folder, load_config(config, [key])).check(resume=True)


def test_a_moved_list_of_cases_is_accepted_where_asked(run, config):
    run.last.touch()
    other = Run(run.folder, load_config(config, ["data.root=elsewhere"]))
    with pytest.raises(ConfigError, match=r"data\.root"):
        other.check(resume=True)
    other.check(resume=True, ignored=["data.root"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name: tiny", "name: '${oc.env:HOME}'"),
        ("source: unet", "source: \"$__import__('os').system('true')\""),
        ("source: unet", "source: unet\n  plan: '@plan'"),
    ],
    ids=["a secret of the environment", "an expression", "a reference"],
)
def test_a_run_of_somebody_else_runs_and_reads_nothing(run, key, value):
    text = run.config.read_text()
    assert key in text
    run.config.write_text(text.replace(key, value))
    with pytest.raises(ConfigError, match="medi3d did not write this config"):
        Run.open(run.folder)


@pytest.fixture
def planned(config, tmp_path):
    """A run whose config names a plan file."""
    plan = tmp_path / "mine.yaml"
    plan.write_text("name: mine\nkernel: in_plane\n")
    run = Run(tmp_path / "run", load_config(config, [f"network.plan={plan}"]))
    run.start()
    return run, plan


@pytest.mark.parametrize("change", ["gone", "edited"])
def test_a_run_keeps_its_plan(planned, change):
    run, plan = planned
    before = plan.read_bytes()
    if change == "gone":
        plan.unlink()
    else:
        plan.write_text("name: other\n")
    opened = Run.open(run.folder)
    assert plan_file(opened.experiment).read_bytes() == before


def test_a_run_does_not_resume_with_another_plan(planned):
    run, plan = planned
    run.last.touch()
    moved = plan.rename(plan.with_name("moved.yaml"))
    same = replace(run.experiment, network=replace(run.experiment.network, plan=str(moved)))
    Run(run.folder, same).check(resume=True)
    moved.write_text("name: other\n")
    with pytest.raises(ConfigError, match=r"network\.plan: the plan in .* not another plan"):
        Run(run.folder, same).check(resume=True)


def test_a_missing_plan_is_one_line(config, tmp_path):
    run = Run(tmp_path / "run", load_config(config, ["network.plan=none.yaml"]))
    with pytest.raises(ConfigError, match="no such file"):
        run.start()
