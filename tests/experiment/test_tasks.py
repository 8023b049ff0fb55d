"""A network for a checkpoint sees its input as in training, whatever became of its weights file."""

import pytest
import torch

from medi3d.engine.state import contract_in
from medi3d.experiment.config import load_config
from medi3d.experiment.tasks import build_network, build_task

MINE = {"mean": [0.2] * 3, "std": [0.5] * 3, "channels": "RGB", "size": 64, "data_range": [-1.0, 1.0]}


@pytest.fixture
def experiment(config):
    options = ["network.source=timm:test_resnet", "network.levels=2", "network.weights=file:gone.pth"]
    options.append("strategy=full")
    return load_config(config, options)


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [({"contract": MINE}, MINE), ({"contract": None}, None), ({}, None)],
    ids=["known", "none", "from before contracts were kept"],
)
def test_the_checkpoint_says_what_input_is_expected(experiment, checkpoint, expected):
    task = build_task(experiment)
    network = build_network(experiment, task, pretrained=False, proof=False, checkpoint=checkpoint)
    assert contract_in(network) == expected


def test_without_the_proof_the_network_is_the_same(config):
    experiment = load_config(config, ["network.source=timm:test_resnet", "network.levels=2"])
    task = build_task(experiment)
    proven, unproven = (build_network(experiment, task, proof=proof).eval() for proof in (True, False))
    unproven.load_state_dict(proven.state_dict())
    volume = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(proven(volume), unproven(volume))
