"""Configs: what they describe, what is refused, and that every shipped one can be built."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from medi3d.errors import ConfigError
from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run
from medi3d.experiment.settings import ClassificationExperiment, SegmentationExperiment
from medi3d.experiment.tasks import build_network, build_task

SHIPPED = sorted(path for kind in ("segmentation", "video") for path in Path("configs", kind).glob("*.yaml"))

GOOD = """
task: segmentation
name: here
data: {root: "${oc.env:SOMEWHERE,../shared}/cohort", modality: MR, labels: {a: 1}}
training: {steps: 10}
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text=GOOD):
        (tmp_path / "config.yaml").write_text(text)
        return tmp_path / "config.yaml"

    return to_file


def test_what_is_not_said_has_its_default(write):
    experiment = load_config(write())
    assert isinstance(experiment, SegmentationExperiment)
    assert (experiment.training.steps, experiment.training.batch_size) == (10, 2)


def test_overrides_come_last(write):
    experiment = load_config(
        write(), ["training.steps=20", "data.patch=[8,8,8]", "training.learning_rate=1e-3"]
    )
    assert experiment.training.steps == 20
    assert experiment.data.patch == [8, 8, 8]
    assert experiment.training.learning_rate == 0.001


def test_environment_variables_are_filled_in(write, monkeypatch):
    assert load_config(write()).data.root == "../shared/cohort"
    monkeypatch.setenv("SOMEWHERE", "/volumes")
    assert load_config(write()).data.root == "/volumes/cohort"


def test_a_config_survives_the_way_through_yaml(write, tmp_path):
    experiment = load_config(write())
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(experiment)))
    assert Run.open(tmp_path).experiment == experiment


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", "training.stepz: unknown key. Did you mean: 'steps'?"),
        ("trainin.steps=3", "trainin: unknown key. Did you mean"),
        (
            "training.steps=many",
            "training.steps: Value 'many' of type 'str' could not be",
        ),
        ("data.patch=[8,x,8]", "data.patch[1]: Value 'x' of type 'str' could not be converted to Integer"),
        ("data.labels.b=two", "data.labels.b: Value 'two' of type 'str' could not be converted to Integer"),
        ("training=5", "training must be a section with keys below it, not 5"),
        ("training.steps=0", "training.steps is 0: it must be at least 1"),
        ("training.schedule=linear", "training.schedule is 'linear': it must be one of cosine, poly"),
        ("training.ema=1.0", "training.ema is 1.0: it must be at least 0 and below 1"),
        ("prediction.mirror=[left]", "prediction.mirror has 'left': depth, height, width"),
        ("prediction.window=[8,8]", "prediction.window is [8, 8]: three sizes"),
        ("strategy=some", "strategy is 'some': one of original, fixed, full"),
        ("task=detection", "task is 'detection': one of segmentation, classification"),
        ("name=a/b", "name is 'a/b'"),
        ("name=???", "name: is missing"),
        ("data.root=${oc.env:NOT_THERE}", "NOT_THERE"),
        ("training.steps", "'training.steps' is not an override: write key=value"),
        ("network.norm=layer", "network.norm is 'layer'"),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_what_is_wrong_is_said_in_one_line_with_its_key(write, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "not readable as YAML"),
        ("- a\n- b", "a config is a mapping of `key: value`"),
        ("task: segmentation\nname: x\n", "data: is missing"),
    ],
    ids=["damaged", "a list", "no data"],
)
def test_a_file_that_is_no_config_is_refused(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no run here"):
        Run.open(tmp_path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_can_be_built(path, shared, monkeypatch):
    monkeypatch.setenv("MEDI3D_SHARED", str(shared.parent))
    experiment = load_config(path)
    assert experiment.name == path.stem
    task = build_task(experiment)
    network = build_network(experiment, task, pretrained=False)
    assert isinstance(experiment, ClassificationExperiment) == (task.name == "classification")
    assert sum(p.numel() for p in network.parameters()) > 1e5


def test_the_arms_of_a_comparison_differ_in_their_weights_only():
    one, other = (load_config(f"configs/segmentation/hippocampus_i3d{arm}.yaml") for arm in ("", "_scratch"))
    assert one.without_pretraining().network == other.network
    assert (one.data, one.training, one.augmentation) == (other.data, other.training, other.augmentation)
