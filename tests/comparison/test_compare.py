"""The grid: what it asks for, that no kill loses a run, and that all executors give the same numbers."""

import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import yaml

from medi3d.comparison.cell import run_cell
from medi3d.comparison.compare import best_rates, run_comparison
from medi3d.comparison.config import load_comparison
from medi3d.comparison.executor import LocalExecutor, RayExecutor, create_executor
from medi3d.comparison.grid import Grid, Point
from medi3d.comparison.report import write_comparison
from medi3d.comparison.wording import answer
from medi3d.errors import ConfigError, DataError
from medi3d.evaluation.statistics import paired_effect
from medi3d.files import alone_in, read_table
from tests.processes import start_command
from tests.tiny import CONFIG

GRID = {
    "name": "tiny",
    "groups": {
        "unet": {
            "reference": "plain",
            "arms": {"plain": {}, "wide": {"network": {"decoder_channels": [8] * 3}}},
        }
    },
    "sizes": [2, 3],
    "seeds": [0, 1],
    "tuning_cases": 1,
    "strategies": ["original"],
    "budgets": {"short": {"steps": 2, "validate_every": 1}},
}


@pytest.fixture
def describe(cohort, tmp_path):
    """Writes the config of a comparison; gives what `load_comparison` does."""

    def write(**changes):
        base = yaml.safe_load(CONFIG.format(root=cohort))
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump(GRID | {"base": base} | changes))
        return load_comparison(path)

    return write


def in_turn(cells, folder):
    """An executor without processes."""
    for cell in cells:
        yield cell, run_cell(cell, folder)


@pytest.fixture
def grid(describe, tmp_path):
    return Grid(*describe(), tmp_path / "runs")


def test_every_point_has_a_run(grid):
    cells = grid.cells({})
    assert len(cells) == 2 * 2 * 2
    assert len({cell.id for cell in cells.values()}) == len(cells)
    assert [point.seed for point in cells] == [0] * 4 + [1] * 4


def test_arms_of_a_pair_share_cases_seed_and_recipe(grid):
    cells = grid.cells({})
    for point, cell in cells.items():
        other = cells[grid.reference_of(point)]
        assert cell.parts == other.parts
        assert cell.experiment.seed == other.experiment.seed == point.seed
        assert cell.experiment.training == other.experiment.training


def test_subsets_are_nested_and_leave_out_tuning_and_evaluation(grid):
    by_place = {(p.size, p.seed): cell.parts.names() for p, cell in grid.cells({}).items()}
    for seed in (0, 1):
        few, many = by_place[2, seed], by_place[3, seed]
        assert set(few["training"]) < set(many["training"])
        assert few["validation"] == many["validation"] == by_place[2, 1 - seed]["validation"]
        counts = Counter(name for names in many.values() for name in names)
        assert max(counts.values()) == 1
        assert len(many["evaluation"]) == 3


def test_folds_judge_every_case_once(describe, tmp_path):
    cells = Grid(*describe(folds=4), tmp_path).cells({})
    chosen = {p.fold: c for p, c in cells.items() if (p.arm, p.seed, p.size) == ("plain", 0, 2)}
    judged = [name for cell in chosen.values() for name in cell.parts.names()["evaluation"]]
    assert sorted(judged) == [f"case_{i}" for i in range(8)]


def test_what_two_groups_ask_for_runs_once(describe, tmp_path):
    groups = GRID["groups"] | {
        "again": {"reference": "same", "arms": {"same": {}, "aa": {"seed_shift": 100}}}
    }
    cells = Grid(*describe(groups=groups), tmp_path).cells({})
    place = {"strategy": "original", "size": 2, "seed": 0, "fold": 0, "budget": "short"}
    same = cells[Point("again", "same", **place)]
    assert same == cells[Point("unet", "plain", **place)]
    shifted = cells[Point("again", "aa", **place)]
    assert shifted.experiment.seed == 100
    assert shifted.parts == same.parts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groups": {"g": {"reference": "none", "arms": {"a": {}}}}},
            "groups.g.reference is 'none': one of a",
        ),
        ({"groups": {"g": {"reference": "a", "arms": {"a": {"network": {"sauce": 1}}}}}}, "arms.a: .*sauce"),
        ({"sizes": [40]}, "sizes has 40: only 4 cases"),
        ({"tuning_cases": 5}, "tuning_cases is 5: no case is left"),
        ({"strategies": ["half"]}, "strategy is 'half'"),
        ({"folds": 9}, "8 subjects cannot make 9 folds"),
        ({"seeds": [1, 1]}, "seeds is .*each once"),
        ({"colour": 1}, "colour: unknown key"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_compared_is_refused(describe, tmp_path, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        Grid(*describe(**changes), tmp_path).cells({})


def test_an_executor_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="--executor is 'slurm': one of local, ray"):
        create_executor("slurm", None, 0)
    with pytest.raises(ConfigError, match="--workers is 0"):
        create_executor("local", 0, 0)
    with pytest.raises(ConfigError, match="--workers is for the executor local"):
        create_executor("ray", 2, 0)


def test_the_best_rate_of_each_arm_is_taken():
    point = Point("g", "a", "full", 4, 0, 0, "short")
    other = Point("g", "b", "full", 4, 0, 0, "short")
    scores = {(point, 0.1): 0.5, (point, 0.01): 0.7, (other, 0.1): 0.6, (other, 0.01): 0.6}
    assert best_rates(scores) == {point.series: 0.01, other.series: 0.01}


@pytest.fixture(scope="module")
def compared(cohort, tmp_path_factory):
    """A finished comparison, its folder, and what it was made from."""
    folder = tmp_path_factory.mktemp("runs")
    base = yaml.safe_load(CONFIG.format(root=cohort))
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(GRID | {"base": base}))
    made = load_comparison(path)
    return run_comparison(*made, folder / "tiny", in_turn), folder / "tiny", made


def test_tables_have_a_row_for_each_point_and_finding(compared):
    results, folder, _ = compared
    runs, cases, effects = (read_table(folder / f"{name}.csv") for name in ("results", "cases", "effects"))
    assert len(runs) == 8
    assert len(cases) == 8 * 3 * 2
    assert [(row["arm"], row["labels"]) for row in effects] == [("wide", 2), ("wide", 3)]
    assert effects[0]["seeds"] == 2
    assert effects[0]["cases"] == 3
    assert effects[0]["effect"] == pytest.approx(effects[0]["dice"] - effects[0]["reference_dice"], abs=1e-5)
    assert not results.failed


def test_the_mean_over_numbers_of_labels_is_the_effect_of_each_case_s_mean(compared):
    results, folder, _ = compared
    (overall,) = results.overall
    few, many = results.findings
    tables = {
        point: results.score_table(point, [0, 1])[0]
        for finding in (few, many)
        for point in (finding.point, finding.reference)
    }
    each = [tables[finding.point] - tables[finding.reference] for finding in (few, many)]
    assert asdict(overall.effect) == pytest.approx(asdict(paired_effect((each[0] + each[1]) / 2)))
    (row,) = read_table(folder / "overall.csv")
    assert row["labels"] == "mean of 2, 3"
    assert results.answer == answer([overall])


def test_finished_runs_keep_their_best_weights_alone(compared):
    folders = list((compared[1] / "cells").iterdir())
    assert len(folders) == 8
    for folder in folders:
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["best.pt"]


def test_a_single_number_of_labels_has_no_mean_and_answers_itself(describe, tmp_path):
    results = run_comparison(*describe(sizes=[2]), tmp_path / "one", in_turn, report=lambda *_: None)
    assert results.overall == []
    assert not (tmp_path / "one" / "overall.csv").exists()
    assert results.answer == answer(results.findings)


def test_finished_runs_are_never_done_again(compared, monkeypatch):
    results, folder, made = compared

    def refuse(cells, folder):
        raise AssertionError("nothing is left to do")

    again = run_comparison(*made, folder, refuse, resume=True)
    assert again.run_rows() == results.run_rows()
    with pytest.raises(ConfigError, match="holds a comparison already; resume it with --resume"):
        run_comparison(*made, folder, refuse)


def test_two_processes_do_not_share_a_grid(compared):
    _, folder, made = compared
    with alone_in(folder, "running this comparison"), pytest.raises(ConfigError, match="another process"):
        run_comparison(*made, folder, in_turn, resume=True)


def test_a_run_that_fails_does_not_stop_the_others(describe, tmp_path):
    arms = {"plain": {}, "wild": {"training": {"learning_rate": 1e30, "gradient_clip": 0.0}}}
    groups = {"unet": {"reference": "plain", "arms": arms}}
    made = describe(groups=groups, sizes=[2], seeds=[0], budgets={"short": {"steps": 6}})
    results = run_comparison(*made, tmp_path / "run", in_turn)
    (why,) = results.failed.values()
    assert "the loss is" in why
    assert len(results.done) == 1
    assert results.answer == "No arm can be compared with its reference yet."


def test_rates_are_searched_on_the_tuning_cases_alone(describe, tmp_path):
    search = {"rates": [0.01, 1e-6], "size": 3}
    made = describe(search=search, sizes=[2], seeds=[0], budgets={"short": {"steps": 3}})
    results = run_comparison(*made, tmp_path / "run", in_turn)
    assert set(results.rates) == {("unet", "plain", "original"), ("unet", "wide", "original")}
    searched = Grid(*made, tmp_path / "run").search_cells()
    assert len(searched) == 4
    assert {cell.split for cell in searched.values()} == {"validation"}
    for (_, rate), cell in searched.items():
        assert cell.experiment.training.learning_rate == rate
        assert not list((tmp_path / "run" / "cells" / cell.id).glob("cases_evaluation.csv"))
    for point, cell in results.cells.items():
        assert cell.experiment.training.learning_rate == results.rates[point.series]


def lose_the_first_time(cell, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tried").exists():
        (folder / "tried").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return f"done by {cell.threads}"


def lose(cell, folder: Path):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_lost_process_is_replaced_and_its_run_done_again(grid, tmp_path):
    cells = list(grid.cells({}).values())[:2]
    outcomes = {
        cell.id: why for cell, why in LocalExecutor(2, lose_the_first_time)(cells, tmp_path / "cells")
    }
    assert outcomes == {cell.id: "done by 1" for cell in cells}


@pytest.mark.slow
def test_a_run_that_is_always_lost_is_given_up(grid, tmp_path):
    ((_, why),) = LocalExecutor(1, lose)(list(grid.cells({}).values())[:1], tmp_path / "cells")
    assert "lost 3 times" in why


def numbers_of(folder: Path):
    """All that a comparison found, without what it cost."""
    costs = {"wall_seconds", "cpu_seconds", "training_cpu_seconds"}
    runs = [{k: v for k, v in row.items() if k not in costs} for row in read_table(folder / "results.csv")]
    cases = [{k: v for k, v in row.items() if k != "seconds"} for row in read_table(folder / "cases.csv")]
    return runs, cases


def command(tmp_path, *options):
    return ["compare", str(tmp_path / "compare.yaml"), "--runs", str(tmp_path), *options]


@pytest.mark.slow
def test_killed_at_random_and_resumed_it_finds_the_same(compared, describe, tmp_path):
    _, whole, _ = compared
    describe()
    chance, results, before = random.Random(0), tmp_path / "tiny", {}

    def finished():
        return {path: path.stat().st_mtime_ns for path in results.glob("cells/*/result.json")}

    for count in (1, 4):
        process = start_command(*command(tmp_path, "--resume", "--workers", "2"))
        while len(finished()) < count and process.is_alive():
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 2))  # somewhere in the runs that are computed now
        process.kill()
        process.join()
        assert before.items() <= finished().items()  # no finished run was lost or done again
        before = finished()
    last = start_command(*command(tmp_path, "--resume"))
    last.join()
    assert last.exitcode == 0
    assert before.items() <= finished().items()
    assert numbers_of(results) == numbers_of(whole)


@pytest.mark.slow
def test_two_ray_workers_find_the_same_as_local(compared, describe, tmp_path):
    ray = pytest.importorskip("ray")
    _, whole, _ = compared
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        run_comparison(*describe(), tmp_path / "ray", RayExecutor())
    finally:
        ray.shutdown()
    assert numbers_of(tmp_path / "ray") == numbers_of(whole)


def test_the_command_says_what_it_found(compared, describe, tmp_path, monkeypatch, capsys):
    from medi3d.cli.entry import main

    _, whole, _ = compared
    (tmp_path / "tiny").symlink_to(whole)
    describe()
    target = tmp_path / "answer.json"
    monkeypatch.setattr(sys, "argv", ["medi3d", *command(tmp_path, "--resume", "--json", str(target))])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    said = json.loads(target.read_text())
    assert said["answer"] in " ".join(capsys.readouterr().out.split())
    assert len(said["effects"]) == 2
    assert [row["labels"] for row in said["overall"]] == ["mean of 2, 3"]


@pytest.mark.parametrize("path", sorted(Path("configs/compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_comparison_is_one(path):
    comparison, resolve = load_comparison(path)
    for group in comparison.groups.values():
        for arm, budget in product(group.arms.values(), comparison.budgets.values()):
            changed = {key: value for key, value in arm.items() if key != "seed_shift"}  # the grid's own
            resolve([comparison.changes, group.changes, {"training": budget}, changed])


@pytest.mark.figures
def test_the_report_says_the_answer_and_needs_no_other_file(compared):
    results, folder, _ = compared
    page = write_comparison(results, folder).read_text()
    assert f'<p class="answer">{results.answer}</p>' in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "Learning rate 0.01, shared" in page
    assert "Budget short: 2 steps, equal for all arms." in page
    figures = {path.name for path in (folder / "plots").iterdir()}
    charts = {f"{name}.svg" for name in ("effects", "labels", "steps", "compute", "scatter", "drift")}
    assert figures == charts | {"cases.png", "filters.png"}
    assert page.count("<img ") == len(figures)


def test_keys_of_older_configs_are_read(describe, caplog):
    groups = {"unet": GRID["groups"]["unet"] | {"labels": [2]}}
    old = {"labels": [3], "tuning": 2, "groups": groups, "search": {"rates": [0.1], "labels": 3}}
    with caplog.at_level("INFO"):
        comparison, _ = describe(sizes=None, tuning_cases=None, **old)
    assert (comparison.sizes, comparison.tuning_cases) == ([3], 2)
    assert (comparison.groups["unet"].sizes, comparison.search.size) == ([2], 3)
    assert "tuning of a comparison is called tuning_cases now" in caplog.text
