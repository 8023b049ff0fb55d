"""Preparing makes a config that trains on the cache as without it, and says all that is wrong before."""

import json

import pytest
import torch

from medi3d.datasets.clips.clips import load_frames, read_clip_list
from medi3d.engine.state import read_checkpoint
from medi3d.errors import ConfigError, DataError
from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run
from medi3d.experiment.settings import SegmentationExperiment
from medi3d.planning.patch_size import measure_step
from medi3d.planning.prepare import run_prepare
from medi3d.training.train import run_training
from tests.tiny import CLIPS_CONFIG


@pytest.fixture
def prepare(cohort, tmp_path):
    """Runs `medi3d prepare` on the tiny cohort; the folder that it wrote."""

    def run(*overrides, data=""):
        path = tmp_path / "mine.yaml"
        path.write_text(f"data: {{root: {cohort}, {data}}}\nnetwork: {{source: unet}}\n")
        run_prepare(path, ["data.patch=[16,16,16]", *overrides], tmp_path / "ready", memory_gb=1, workers=1)
        return tmp_path / "ready"

    return run


def test_what_is_left_open_is_chosen_and_what_is_given_is_kept(prepare):
    folder = prepare("training.steps=7", data="modality: MR, validation: 3")
    experiment = load_config(folder / "config.yaml")
    assert isinstance(experiment, SegmentationExperiment)
    assert (experiment.name, experiment.training.steps, experiment.data.validation) == ("mine", 7, 3)
    assert experiment.data.labels == {"low": 1, "high": 2}
    assert experiment.data.spacing == [1.26, 1.26, 1.26]
    described = json.loads((folder / "fingerprint.json").read_text())
    assert len(described["cases"]) == 8
    assert not described["problems"]
    stored = json.loads((folder / "choices.json").read_text())
    assert {"data.spacing", "data.labels"} <= {choice["key"] for choice in stored["choices"] if choice["why"]}
    assert stored["labels_kept_by_grid"]["low"]["mean"] > 0.8
    assert len(list((folder / "cache").iterdir())) == 8


def test_training_on_the_cache_is_training_without_it(prepare, tmp_path):
    quick = [
        "training.steps=3",
        "data.foreground=0.8",
        "training.precision=fp32",
        "data.modality=MR",
        "data.validation=3",
    ]
    config = prepare(*quick, "data.spacing=[2,1,1]") / "config.yaml"
    weights = []
    for name, overrides in (("with", []), ("without", ["data.cache=null"])):
        run_training(Run(tmp_path / name, load_config(config, [*overrides, f"name={name}"])))
        weights.append(read_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["network"])
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=0, msg=key)


def test_every_fault_is_named_and_nothing_is_cached(prepare, tmp_path, capsys):
    with pytest.raises(DataError, match=r"8 problems in .* the first: .*case_0.nii.gz: label values 2"):
        prepare(data="modality: MR, labels: {low: 1}")
    assert capsys.readouterr().out.count("label values 2") == 8
    assert len(json.loads((tmp_path / "ready/fingerprint.json").read_text())["problems"]) == 8
    assert not (tmp_path / "ready/cache").exists()


def test_a_modality_that_is_not_clear_is_asked_for(prepare):
    with pytest.raises(ConfigError, match="not clear from the images"):
        prepare()


def test_a_step_is_measured_and_takes_more_for_a_larger_patch(config):
    experiment = load_config(config)
    assert isinstance(experiment, SegmentationExperiment)
    small, large = (measure_step(experiment, (side, side, side)) for side in (16, 64))
    assert 0 <= small < large < 4 * 2**30
    assert large > 2 * 64**3 * 4 * 10  # two samples of more than ten maps in float32


def test_the_flow_of_clips_is_computed_where_training_looks_for_it(clips, tmp_path, monkeypatch):
    config = tmp_path / "clips.yaml"
    config.write_text(CLIPS_CONFIG.format(root=clips))
    flow = ["data.streams=flow", f"data.flow_cache={tmp_path / 'flow'}", "network.in_channels=2"]
    made = run_prepare(config, flow, None, memory_gb=1, workers=1)
    assert made == {"clips": 6, "damaged": []}
    monkeypatch.setattr("medi3d.datasets.clips.flow.compute_flow", None)  # nothing is left to compute
    settings = load_config(config, flow).data
    assert load_frames(read_clip_list(settings).clips[0], settings)["image"].shape[0] == 2
    with pytest.raises(ConfigError, match=r"data\.streams is rgb"):
        run_prepare(config, [], None, memory_gb=1, workers=1)
