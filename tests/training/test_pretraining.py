"""Pretraining end to end on tiny volumes: it learns, it goes on exactly, and its encoder is a weights row."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from ignite.engine import Events
from safetensors import safe_open

from medi3d.cli.entry import main
from medi3d.engine.state import read_checkpoint
from medi3d.errors import ConfigError, DataError
from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run
from medi3d.experiment.tasks import build_data, build_network, build_task
from medi3d.models.artifact import load_artifact, read_description
from medi3d.models.encoders import create_encoder
from medi3d.models.networks import create_segmenter
from medi3d.training.pretrained_encoder import check_unseen
from medi3d.training.train import run_training
from tests.tiny import kill, with_handler

PRETRAINING = """
task: pretraining
name: pre
data:
  cohorts:
    - {{root: {root}, exclude_validation_of: {config}}}
  patch: [16, 16, 16]
  validation: 1
pretext: {{kind: {kind}, labels: {{low: [1], high: [2]}}, cube: 4}}
network: {{source: timm:test_resnet, levels: 3}}
training: {{steps: 4, batch_size: 2, validate_every: 2, precision: fp32, encoder_factor: 1.0}}
augmentation: {{affine: 0.0, gamma: 0.0, noise: 0.0}}
"""


def pretraining(cohort, config, kind="masked", overrides=()):
    path = config.with_name("pre.yaml")
    path.write_text(PRETRAINING.format(root=cohort, config=config, kind=kind))
    return load_config(path, list(overrides))


@pytest.fixture(scope="module")
def pretrained(cohort, tmp_path_factory):
    """A finished pretraining: its folder, and what the command returned."""
    from tests.tiny import CONFIG

    folder = tmp_path_factory.mktemp("pretrained")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(root=cohort))
    return folder / "run", run_training(Run(folder / "run", pretraining(cohort, config)))


@pytest.mark.parametrize(
    ("kind", "head"),
    [("masked", "convolution"), ("restoration", "convolution"), ("synthetic", "subpixel")],
    ids=["masked", "restoration", "synthetic"],
)
def test_loss_falls(cohort, config, tmp_path, kind, head, monkeypatch):
    steps = [
        f"network.head={head}",
        "training.steps=25",
        "training.validate_every=25",
        "training.learning_rate=0.02",
    ]
    losses = []
    with_handler(
        monkeypatch, Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"])
    )
    facts = run_training(Run(tmp_path / "run", pretraining(cohort, config, kind, steps)))
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:4])
    assert ("dice" if kind == "synthetic" else "explained") in facts


def test_a_run_leaves_an_artifact_with_its_origin(pretrained):
    folder, facts = pretrained
    assert facts["artifact"] == str(folder / "encoder.safetensors")
    for name in ("plots/pretext.png", "plots/curves.png", "report.html", "metrics.csv"):
        assert (folder / name).stat().st_size > 0
    origin = read_description(facts["artifact"])["weights"]["pretraining"]
    assert (origin["steps"], origin["seed"]) == (facts["steps"], 0)
    assert origin["pretext"]["kind"] == "masked"
    assert origin["started_from"] == {"source": "timm:test_resnet", "weights": None}
    assert len(origin["cases"]) == 4  # of 8: without 3 of the config's validation and 1 of its own


def test_the_artifact_is_the_best_encoder_on_both_ways_in(pretrained):
    folder, facts = pretrained
    best = read_checkpoint(folder / "checkpoints" / "best.pt")["network"]
    whole = load_artifact(facts["artifact"])
    filled = create_encoder("timm:test_resnet", weights=f"file:{facts['artifact']}", levels=3)
    assert filled.report.weights["fraction"] == 1
    volume = torch.rand(1, 1, 16, 16, 16) * 2 - 1
    for one, other in zip(whole.eval()(volume), filled.eval()(volume), strict=True):
        assert torch.equal(one, other)
    for name, tensor in whole.network.state_dict().items():
        if "running" not in name and "tracked" not in name:  # these are calibrated on whole patches
            assert torch.equal(tensor, best[f"encoder.network.{name}"]), name
    assert create_segmenter(facts["artifact"], num_classes=3)(volume).shape == (1, 3, 16, 16, 16)


def test_the_contract_of_the_first_weights_is_kept(cohort, config, tmp_path, monkeypatch, shared):
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(shared / "weights"))
    lite = "timm:tf_efficientnet_lite0"
    network = [f"network.source={lite}", "network.weights=imagenet/efficientnet-lite0", "network.levels=2"]
    experiment = pretraining(cohort, config, overrides=[*network, "training.steps=1"])
    path = run_training(Run(tmp_path / "run", experiment))["artifact"]
    whole = create_encoder(path)
    for read in (True, False):
        filled = create_encoder(lite, weights=f"file:{path}", levels=2, read_weights=read)
        assert filled.normaliser.to_dict() == whole.normaliser.to_dict()


def test_all_that_is_restored_went_through_the_encoder(cohort, config):
    experiment = pretraining(cohort, config)
    network = build_network(experiment, build_task(experiment)).eval()
    volume = torch.rand(1, 1, 16, 16, 16)
    features = network.encoder(volume)
    one, other = (network.decoder(x, features)[0] for x in (volume, torch.zeros_like(volume)))
    assert torch.equal(one, other)


def test_a_stopped_pretraining_ends_with_the_same_artifact(cohort, config, tmp_path, pretrained):
    experiment = pretraining(cohort, config)
    with pytest.MonkeyPatch.context() as patch:
        with_handler(patch, Events.ITERATION_STARTED(once=4), kill)
        with pytest.raises(KeyboardInterrupt):
            run_training(Run(tmp_path / "run", experiment))
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 2
    facts = run_training(Run(tmp_path / "run", experiment), resume=True)
    tensors = []
    for path in (facts["artifact"], pretrained[1]["artifact"]):
        with safe_open(path, framework="pt") as file:
            tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_it_starts_from_other_weights(cohort, config, tmp_path, pretrained):
    start = f"network.weights=file:{pretrained[1]['artifact']}"
    experiment = pretraining(cohort, config, "restoration", [start, "training.steps=1"])
    network = build_network(experiment, build_task(experiment))
    first = load_artifact(pretrained[1]["artifact"]).network.state_dict()
    assert all(torch.equal(v, first[k]) for k, v in network.encoder.network.state_dict().items())
    facts = run_training(Run(tmp_path / "run", experiment))
    origin = read_description(facts["artifact"])["weights"]["pretraining"]["started_from"]
    assert origin["pretraining"]["pretext"]["kind"] == "masked"


def test_validation_cases_are_never_seen(cohort, config, pretrained, tmp_path):
    target = load_config(config, [f"network.source={pretrained[1]['artifact']}", "strategy=full"])
    data = build_data(target)
    seen = {volume.name for volume in build_data(pretraining(cohort, config)).training}
    assert not seen & {f"{cohort.name}/{case.name}" for case in data.validation}
    check_unseen(target, data.validation)
    with pytest.raises(DataError, match="was pretrained on this validation case"):
        check_unseen(target, data.training)
    with pytest.raises(DataError, match="was pretrained on this validation case"):
        run_training(Run(tmp_path / "judged", target), split="training")
    with pytest.raises(ConfigError, match="an artifact holds weights, which strategy original cannot use"):
        build_network(dataclasses.replace(target, strategy="original"), build_task(target))


def test_a_validation_sample_is_the_same_each_time(cohort, config):
    data = build_data(pretraining(cohort, config, "restoration"))
    sample = data.load(data.validation[0])
    one, other = data.whole(sample), data.whole(sample)
    assert torch.equal(one["image"], other["image"])
    assert not torch.equal(data.change(sample)["image"], data.change(sample)["image"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.source=unet", "3D from the start"),
        ("strategy=fixed", "pretraining trains all weights"),
        ("data.validation=8", "is left for training"),
        ("pretext.kind=colour", "pretext.kind is 'colour'"),
        ("tuning.batchnorm=group", "keeps its batch norms"),
    ],
)
def test_refusals(cohort, config, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        run_training(Run(tmp_path / "run", pretraining(cohort, config, overrides=[override])))


def test_the_excluded_config_must_be_of_the_cohort(cohort, config):
    other = load_config(config)
    config.write_text(config.read_text().replace(str(other.data.root), str(config.parent)))
    with pytest.raises(ConfigError, match="not about"):
        build_data(pretraining(cohort, config))


def test_the_command(cohort, config, tmp_path, monkeypatch, capsys):
    pretraining(cohort, config)
    arguments = ["pretrain", str(config.with_name("pre.yaml")), "training.steps=1", "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["medi3d", *arguments, "--json", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    facts = json.loads((tmp_path / "x.json").read_text())
    assert facts["sha256"] in capsys.readouterr().out
    assert Run.open(tmp_path / "pre").experiment.task == "pretraining"
    monkeypatch.setattr(sys, "argv", ["medi3d", "pretrain", str(config)])
    with pytest.raises(SystemExit):
        main()
    assert "`medi3d train` is for that" in capsys.readouterr().err


def test_the_shipped_configs_leave_the_evaluation_cases_out(shared, monkeypatch):
    monkeypatch.setenv("MEDI3D_SHARED", str(shared.parent))
    hippocampus = build_data(load_config("configs/segmentation/hippocampus_i3d.yaml"))
    for name in ("i3d_restoration", "i3d_kinetics_restoration", "lite0_restoration"):
        data = build_data(load_config(f"configs/pretraining/{name}.yaml"))
        seen = {file for volume in (*data.training, *data.validation) for file in volume.files}
        assert not seen & {image for case in hippocampus.validation for image in case.images}
        assert seen & {image for case in hippocampus.training for image in case.images}
