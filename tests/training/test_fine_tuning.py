"""Options of fine-tuning: batch norm policies and the drift that they cure, gradual unfreezing, L2-SP."""

import csv
import dataclasses

import pytest
import torch
from ignite.engine import Events
from torch import nn

from medi3d.engine.precision import Precision
from medi3d.engine.settings import TrainingSettings
from medi3d.engine.state import TrainingState, read_checkpoint
from medi3d.errors import ConfigError
from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run
from medi3d.experiment.strategies import TuningSettings, parameter_groups
from medi3d.experiment.tasks import build_network, build_task
from medi3d.inflation.checkpointing import CheckpointedBlock
from medi3d.inflation.fold import Call
from medi3d.models.artifact import save_artifact
from medi3d.models.encoders import create_encoder
from medi3d.models.norms import VolumeNorm, batch_norms, convert_norms
from medi3d.training.domain_shift import measure_drift, recalibrate, stages
from medi3d.training.fine_tuning import GradualUnfreezing, pull_to_start
from medi3d.training.train import run_training
from tests.tiny import kill, with_handler

FP32 = Precision(torch.device("cpu"), bf16=False)


def encoder_of(source="timm:test_resnet", levels=3):
    return create_encoder(source, levels=levels)


def volumes(shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 1, 16, 16, 16, generator=generator) * scale + shift for _ in range(3)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    return save_artifact(encoder_of(), tmp_path_factory.mktemp("artifact") / "e.safetensors")


def tuned(config, artifact, *overrides):
    return load_config(config, [f"network.source={artifact}", "strategy=full", *overrides])


def test_recalibration_cures_the_drift_and_changes_no_weight():
    encoder = encoder_of()
    weights = {name: p.clone() for name, p in encoder.named_parameters()}
    before = measure_drift(encoder, volumes(3.0, 5.0), FP32)
    recalibrate(encoder, volumes(3.0, 5.0), FP32)
    after = measure_drift(encoder, volumes(3.0, 5.0), FP32)
    assert [row["stage"] for row in after] == [0, 1, 2]
    assert sum(row["norms"] for row in after) == len(batch_norms(encoder))
    assert before[0]["spread"] > 1
    for row in after:
        assert row["shift"] < 0.1
        assert row["spread"] < 0.2
    assert all(torch.equal(p, weights[name]) for name, p in encoder.named_parameters())


def test_drift_of_one_norm_by_hand():
    class One(nn.Module):
        in_channels, out_channels, strides = 1, [1], [(1, 1, 1)]

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm3d(1, eps=0.0)

        def forward(self, volume):
            return [self.norm(volume)]

    volume = torch.tensor([1.0, 5.0]).view(1, 1, 1, 1, 2)  # mean 3, variance 4
    (row,) = measure_drift(One(), [volume], FP32)
    assert (row["shift"], row["deviation"]) == (3, 2)
    assert row["spread"] == pytest.approx(1.3863, abs=1e-4)


@pytest.mark.parametrize("source", ["timm:test_resnet", "inception_v1", "timm:tf_efficientnet_lite0"])
def test_instance_norm_is_over_each_volume_with_the_scale_of_the_batch_norm(source):
    encoder = encoder_of(source, levels=2).eval()
    norms = batch_norms(encoder)
    count, keys = len(norms), {name for name, _ in encoder.named_parameters()}
    with torch.no_grad():
        for layer in norms.values():
            layer.bias.normal_()
    convert_norms(encoder, "instance")
    assert not batch_norms(encoder)
    converted = [layer for layer in encoder.modules() if isinstance(layer, VolumeNorm)]
    assert len(converted) == count
    assert {name for name, _ in encoder.named_parameters()} == keys
    one, two = torch.randn(1, 1, 16, 16, 16), torch.randn(1, 1, 16, 16, 16)
    together = encoder(torch.cat([one, two]))
    for both, alone in zip(together, encoder(two), strict=True):  # no volume sees another one
        torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4)
    for row in measure_drift(encoder, [one, two], FP32):
        assert row["shift"] < 1e-3
    x = torch.randn(2, converted[0].groups, 4, 5, 6)
    folded = x.transpose(1, 2).flatten(0, 1)
    with encoder.fold.running(Call(batch=2)):
        found = converted[0].normalise(folded).unflatten(0, (2, 4)).transpose(1, 2)
    expected = nn.functional.instance_norm(x, eps=converted[0].eps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_stages_part_all_parameters_by_the_map_they_first_reach():
    encoder = encoder_of()
    found = stages(encoder)
    names = [name for part in found for name in part]
    assert sorted(names) == sorted(name for name, _ in encoder.named_parameters())
    encoder.eval().requires_grad_(False)
    volume = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1)  # no branch stays closed by a scale of 0
        before = encoder(volume)
        dict(encoder.named_parameters())[found[1][0]].add_(1.0)
    changed = [not torch.equal(a, b) for a, b in zip(before, encoder(volume), strict=True)]
    assert changed == [False, True, True]


def state_of(network, steps=10, **options):
    settings = TrainingSettings(steps=steps, warmup=0.0, **options)
    groups = parameter_groups(network, 0.1, 0.5, decays=False)
    return TrainingState.create(network, groups, settings)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(1, 1, bias=False)
        self.head = nn.Linear(1, 1, bias=False)


def test_l2_sp_pulls_the_encoder_to_its_start_by_lr_times_strength():
    network = Parts()
    state = state_of(network)
    pull_to_start(state, 0.4)
    start = network.encoder.weight.detach().clone()
    with torch.no_grad():
        network.encoder.weight += 1
    head = network.head.weight.detach().clone()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    assert network.encoder.weight.item() == pytest.approx(start.item() + 1 - 0.05 * 0.4)
    assert network.head.weight.item() == pytest.approx(head.item() * (1 - 0.1 * 0.01))  # AdamW's own decay


def test_stages_thaw_from_the_deepest_on():
    network = nn.Module()
    network.encoder = encoder_of()
    frozen = []
    handler = GradualUnfreezing(network, state_of(network, steps=12), 0.5, frozen)
    assert [handler.waiting(step) for step in (0, 2, 4, 6)] == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
        [False, False, False],
    ]


def test_a_run_with_unfreezing_moves_only_what_is_thawed(config, artifact, tmp_path):
    experiment = tuned(config, artifact, "tuning.unfreeze=1.0", "training.steps=2")
    first = build_network(experiment, build_task(experiment)).state_dict()
    deepest = {f"encoder.{name}" for name in stages(encoder_of())[-1]}
    run_training(Run(tmp_path / "run", experiment))
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["network"]
    moved = {key for key in first if key.startswith("encoder") and not torch.equal(first[key], last[key])}
    weights = {key for key in moved if "running" not in key and "tracked" not in key}
    assert weights
    assert weights <= deepest
    owners = {name.rsplit(".", 1)[0] for name in deepest}
    assert {key.rsplit(".", 1)[0] for key in moved} <= owners


@pytest.mark.parametrize("policy", ["keep", "recalibrate", "freeze", "instance", "group"])
def test_every_policy_trains_and_leaves_its_drift(config, artifact, tmp_path, policy):
    experiment = tuned(config, artifact, f"tuning.batchnorm={policy}", "training.steps=1")
    run_training(Run(tmp_path / "run", experiment))
    with (tmp_path / "run" / "drift.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = ["loaded"] if policy in ("keep", "freeze") else ["loaded", policy]
    assert [row["weights"] for row in rows] == [name for name in measured for _ in range(3)]
    loaded = [float(row["spread"]) for row in rows[:3]]
    if policy == "recalibrate":
        assert all(float(row["spread"]) < spread for row, spread in zip(rows[3:], loaded, strict=True))
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["network"]
    first = build_network(experiment, build_task(experiment)).state_dict()
    assert first.keys() == last.keys()
    if policy == "freeze":
        kept = [key for key in first if "encoder" in key and ".bn" in key]
        assert kept
        assert all(torch.equal(first[key], last[key]) for key in kept)


def test_activations_computed_again_train_the_same_network(config, tmp_path, monkeypatch):
    runs, run = [], CheckpointedBlock.forward
    monkeypatch.setattr(CheckpointedBlock, "forward", lambda *args: (runs.append(1), run(*args))[1])
    for name, again in (("kept", "false"), ("again", "true")):
        options = [f"training.checkpoint_activations={again}", "training.steps=2"]
        run_training(Run(tmp_path / name, load_config(config, options)))
    kept, again = (read_checkpoint(tmp_path / n / "checkpoints" / "last.pt") for n in ("kept", "again"))
    assert runs
    assert kept["network"].keys() == again["network"].keys()
    assert all(torch.equal(value, again["network"][key]) for key, value in kept["network"].items())


def test_a_resumed_run_pulls_to_the_same_start(config, artifact, tmp_path):
    options = ["tuning.l2_sp=1.0", "tuning.batchnorm=recalibrate", "training.steps=4"]
    experiment = tuned(config, artifact, *options)
    run_training(Run(tmp_path / "whole", experiment))
    half = tmp_path / "half"
    with pytest.MonkeyPatch.context() as patch:
        with_handler(patch, Events.ITERATION_STARTED(once=4), kill)
        with pytest.raises(KeyboardInterrupt):
            run_training(Run(half, experiment))
    run_training(Run(half, experiment), resume=True)
    whole = read_checkpoint(tmp_path / "whole" / "checkpoints" / "last.pt")["network"]
    again = read_checkpoint(half / "checkpoints" / "last.pt")["network"]
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batchnorm": "drop"}, "tuning.batchnorm is 'drop'"),
        ({"unfreeze": 2.0}, "tuning.unfreeze is 2.0"),
        ({"l2_sp": -1.0}, "tuning.l2_sp is -1.0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ConfigError, match=message):
        TuningSettings(**wrong)


@pytest.mark.parametrize("option", ["tuning.l2_sp=0.1", "tuning.unfreeze=0.5"])
def test_what_needs_pretrained_weights_is_refused_without(config, artifact, option):
    with pytest.raises(ConfigError, match="for pretrained weights and strategy full"):
        load_config(config, [option])
    with pytest.raises(ConfigError, match="for pretrained weights and strategy full"):
        dataclasses.replace(tuned(config, artifact, option), strategy="fixed")


def test_an_encoder_without_batch_norm_has_none_to_freeze(config, tmp_path):
    with pytest.raises(ConfigError, match="has no batch norm"):
        run_training(Run(tmp_path / "run", load_config(config, ["tuning.batchnorm=freeze"])))
