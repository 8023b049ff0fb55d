"""Clips are compared as volumes are: the same grid and report, with top-1 and whole scenes."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from medi3d.comparison.compare import run_comparison
from medi3d.comparison.config import load_comparison
from medi3d.comparison.grid import Grid
from medi3d.comparison.report import write_comparison
from medi3d.comparison.subsets import Parts
from medi3d.datasets.clips.clips import Clip, read_clip_list
from medi3d.errors import ConfigError
from medi3d.evaluation.statistics import by_unit, paired_effect
from medi3d.files import read_table
from tests.comparison.test_compare import in_turn
from tests.tiny import CLIPS_CONFIG, write_clips

GRID = {
    "name": "clips",
    "groups": {
        "resnet": {"reference": "adam", "arms": {"adam": {}, "sgd": {"training": {"optimizer": "sgd"}}}}
    },
    "strategies": ["original"],
    "seeds": [0],
    "folds": 2,
    "tuning_cases": 3,
    "budgets": {"short": {"steps": 2, "validate_every": 1, "precision": "fp32"}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve clips, two of each scene, and a comparison on them."""
    folder = tmp_path_factory.mktemp("compared")
    base = yaml.safe_load(CLIPS_CONFIG.format(root=write_clips(folder / "clips", takes=2)))
    (folder / "compare.yaml").write_text(yaml.safe_dump(GRID | {"base": base}))
    return load_comparison(folder / "compare.yaml"), folder


@pytest.fixture(scope="module")
def compared(made):
    loaded, folder = made
    return run_comparison(*loaded, folder / "run", in_turn), folder / "run"


def test_every_clip_is_judged_once_and_no_scene_is_in_two_parts(made):
    loaded, folder = made
    cells = Grid(*loaded, folder / "none").cells({})
    chosen = [cell.parts for point, cell in cells.items() if point.arm == "adam"]
    judged = [clip.name for parts in chosen for clip in parts.evaluation]
    assert len(judged) == len(set(judged)) == 12
    for parts in chosen:
        scenes = [{clip.subject for clip in clips} for clips in parts.splits.values()]
        assert all(scenes)
        assert sum(map(len, scenes)) == len(set.union(*scenes)) == 6
        assert sorted(clip.label for clip in parts.tuning) == [0, 0, 1, 1]


def test_a_list_of_clips_comes_back_as_it_was_written(made, tmp_path):
    (comparison, resolve), _ = made
    base = resolve([comparison.changes])
    listed = read_clip_list(base.data)
    third = len(listed.clips) // 3
    parts = Parts(*(listed.clips[i * third : (i + 1) * third] for i in range(3)), listed.classes)
    parts.write(tmp_path / "list.csv")
    again = read_clip_list(replace(base.data, root=str(tmp_path / "list.csv")))
    assert again.classes == listed.classes
    assert [(c.name, c.subject, c.split) for c in again.clips] == [
        (c.name, c.subject, split) for split, clips in parts.splits.items() for c in clips
    ]


def test_subsets_of_clips_take_each_class_in_turn():
    clips = tuple(Clip(Path(f"{i}.mp4"), label=i % 4, group=str(i)) for i in range(40))
    parts = Parts(clips, (), (), ("a", "b", "c", "d"))
    few, many = parts.subset(4, seed=1), parts.subset(9, seed=1)
    assert sorted(clip.label for clip in few.training) == [0, 1, 2, 3]
    assert set(few.training) < set(many.training)


@pytest.mark.figures
def test_tables_report_and_figures_speak_of_top1_and_scenes(compared):
    results, folder = compared
    (effect,) = read_table(folder / "effects.csv")
    assert effect["cases"] == 6  # scenes, of 12 clips
    assert effect["effect"] == pytest.approx(effect["top1"] - effect["reference_top1"], abs=1e-5)
    with (folder / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 12
    assert {row["predicted"] for row in rows} <= {"above", "below"}
    page = write_comparison(results, folder).read_text()
    assert f'<p class="answer">{results.answer}</p>' in page
    assert "Dice" not in re.sub(r"base64,[\w+/=]+", "", page)
    assert "draw whole scenes, 6 of them" in page
    figures = {path.stem for path in (folder / "plots").iterdir()}
    assert {"effects", "labels", "steps", "scatter", "confusion", "filters", "drift"} <= figures
    assert "Dice" not in (folder / "plots" / "labels.svg").read_text()


def test_finished_runs_of_clips_are_never_done_again(compared, made):
    def refuse(cells, folder):
        raise AssertionError("nothing is left to do")

    results, folder = compared
    assert run_comparison(*made[0], folder, refuse, resume=True).run_rows() == results.run_rows()


def test_units_keep_the_mean_and_widen_the_interval():
    rng = np.random.default_rng(0)
    scenes = np.repeat(np.arange(20), 4)
    differences = 0.1 + 0.3 * rng.normal(size=20)[scenes] + 0.02 * rng.normal(size=(3, 80))
    by_scene = by_unit(differences, scenes.tolist())
    assert by_scene.shape == (3, 20)
    assert by_scene.mean() == pytest.approx(differences.mean())
    assert np.array_equal(by_unit(differences, list(range(80))), differences)
    clips, whole = paired_effect(differences), paired_effect(by_scene)
    assert whole.high - whole.low > 1.5 * (clips.high - clips.low)


def test_a_pretraining_is_not_compared(made, tmp_path):
    comparison, _ = made[0]

    class Pretraining:
        task = "pretraining"

    with pytest.raises(ConfigError, match="segmentation and classification are compared"):
        Grid(comparison, lambda changes: Pretraining(), tmp_path)
