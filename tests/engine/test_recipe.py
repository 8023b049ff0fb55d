"""The paper's recipe beside our own, and the loss of classifiers that answer more than once."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from medi3d.engine.budget import learning_rate_factor
from medi3d.engine.settings import TrainingSettings
from medi3d.engine.state import TrainingState
from medi3d.engine.task import classification
from medi3d.errors import ConfigError


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_optimiser_is_the_one_asked_for(name, kind):
    net = nn.Linear(2, 2)
    groups = [{"name": "rest", "params": list(net.parameters()), "lr": 0.1}]
    state = TrainingState.create(net, groups, TrainingSettings(optimizer=name, weight_decay=0.5))
    assert type(state.optimizer) is kind
    assert state.optimizer.defaults["weight_decay"] == 0.5
    assert state.optimizer.defaults.get("momentum", 0.9) == 0.9


def test_the_rate_falls_to_a_tenth_at_each_drop():
    settings = TrainingSettings(steps=100, warmup=0.0, schedule="step", drops=[0.5, 0.8])
    rates = [learning_rate_factor(step, settings) for step in (0, 49, 50, 79, 80, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("wrong", [{"drops": [1.0]}, {"drops": [0.0]}, {"optimizer": "adam"}], ids=str)
def test_a_wrong_recipe_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainingSettings(**wrong)


def test_every_step_of_a_recurrent_network_counts_alike():
    loss = classification(["a", "b", "c"]).loss
    logits, target = torch.randn(2, 3, 4), torch.tensor([0.0, 2.0])
    each = [cross_entropy(logits[:, :, step], target.long()) for step in range(4)]
    assert torch.allclose(loss(logits, target), torch.stack(each).mean())


def test_streams_add_their_losses_and_learn_apart():
    loss = classification(["a", "b"]).loss
    target = torch.tensor([0.0, 1.0])
    streams = [torch.randn(2, 2, requires_grad=True) for _ in range(2)]
    loss(streams, target).backward()
    for stream in streams:
        alone = stream.detach().requires_grad_()
        loss(alone, target).backward()
        assert torch.equal(stream.grad, alone.grad)
