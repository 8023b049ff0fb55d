"""What each strategy trains, and that a frozen encoder does not move."""

import dataclasses

import pytest
import torch
from torch import nn

from medi3d.engine.state import read_checkpoint
from medi3d.errors import ConfigError
from medi3d.experiment.config import load_config
from medi3d.experiment.run import Run
from medi3d.experiment.strategies import frozen_parts, parameter_groups
from medi3d.experiment.tasks import build_network, build_task
from medi3d.training.train import run_training


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
        self.head = nn.Conv3d(2, 2, 1)


def sizes(groups):
    return {group["name"]: (sum(p.numel() for p in group["params"]), group["lr"]) for group in groups}


def test_encoder_and_rest_have_their_own_learning_rates():
    network = Parts()
    assert not frozen_parts(network, "full")
    assert sizes(parameter_groups(network, 0.1, 0.2)) == {
        "encoder": (8, pytest.approx(0.02)),
        "rest": (6, 0.1),
    }


def test_a_fixed_encoder_is_not_in_the_optimiser():
    network = Parts()
    assert frozen_parts(network, "fixed") == (network.encoder,)
    assert sizes(parameter_groups(network, 0.1, 0.2)) == {"rest": (6, 0.1)}


def test_a_network_without_encoder_trains_whole_but_cannot_be_fixed():
    assert sizes(parameter_groups(nn.Conv3d(1, 2, 1), 0.1, 0.2)) == {"rest": (4, 0.1)}
    with pytest.raises(ConfigError, match="Conv3d has no encoder to freeze"):
        frozen_parts(nn.Conv3d(1, 2, 1), "fixed")


@pytest.mark.parametrize("strategy", ["fixed", "full"])
def test_only_a_fixed_encoder_stays_as_it_was(config, tmp_path, strategy):
    source = ["network.source=timm:test_resnet", "network.levels=3", f"strategy={strategy}"]
    experiment = load_config(config, [*source, "training.steps=2"])
    run_training(Run(tmp_path / "run", experiment))
    before = build_network(experiment, build_task(experiment)).state_dict()
    after = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["network"]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any(key.startswith("decoder") for key in moved)
    assert any(key.startswith("encoder") for key in moved) == (strategy == "full")
    assert any("running_mean" in key for key in moved) == (strategy == "full")


def test_original_draws_its_weights_and_asks_for_none(config):
    experiment = load_config(config, ["network.source=timm:test_resnet", "network.weights=nowhere/none"])
    task = build_task(experiment)
    network = build_network(experiment, task)
    again = build_network(dataclasses.replace(experiment, seed=1), task)
    assert not torch.equal(*(next(n.encoder.parameters()) for n in (network, again)))
