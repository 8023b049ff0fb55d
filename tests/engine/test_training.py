"""Training by arithmetic, exact resume, and what ends a run."""

import dataclasses

import pytest
import torch
from ignite.engine import Events
from torch import nn

from medi3d.datasets.sampling.stream import StreamBatches, TrainingStream, training_loader, validation_loader
from medi3d.engine.budget import learning_rate_factor
from medi3d.engine.handlers import Checkpoints, MetricsTable, TrainingProgress, Validation
from medi3d.engine.precision import Precision
from medi3d.engine.settings import TrainingSettings
from medi3d.engine.state import TrainingState, fill_network, read_checkpoint, write_checkpoint
from medi3d.engine.task import segmentation
from medi3d.engine.trainer import build_evaluator, build_trainer
from medi3d.errors import TrainingError, WeightsError

FP32 = Precision(torch.device("cpu"), bf16=False)


class OneWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.weight * x


def identity(item):
    return item


def scalar_task(**changes):
    """Loss = logits - target, so the gradient of the weight is the image."""
    task = segmentation(["spot"], (8, 8, 8))
    return dataclasses.replace(task, loss=lambda y_pred, y: (y_pred - y).mean(), **changes)


def loader_of(items, state, settings, transform=None, workers=0, seed=3):
    stream = TrainingStream(items, identity, transform, seed=seed)
    return training_loader(stream, StreamBatches(state.step, settings.steps, settings.batch_size), workers)


def train_one_weight(settings, image, learning_rate=1.0, factors=(1.0,)):
    """One weight, starting at 1, after plain gradient steps on a constant image."""
    network = OneWeight()
    state = TrainingState.create(
        network, [{"name": "rest", "params": network.parameters(), "lr": 1.0}], settings
    )
    state.optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate)
    state.scheduler = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda step: [*factors, 0.0][step])
    item = {"image": torch.full((1, 1, 1, 1), image), "label": torch.zeros(1, 1, 1, 1), "name": "case7"}
    build_trainer(scalar_task(), state, loader_of([item], state, settings), settings, FP32).run()
    assert state.step == settings.steps
    return network.weight.item()


def test_three_steps_by_hand():
    settings = TrainingSettings(steps=3, batch_size=1, gradient_clip=0.0)
    # each step subtracts 0.5 * factor * 2: 1 - (1 + 0.5 + 0.25)
    assert train_one_weight(settings, 2.0, learning_rate=0.5, factors=(1.0, 0.5, 0.25)) == -0.75


def test_gradients_are_clipped():
    settings = TrainingSettings(steps=1, batch_size=1, gradient_clip=0.5)
    assert train_one_weight(settings, 2.0) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run(bad):
    settings = TrainingSettings(steps=3, batch_size=1)
    with pytest.raises(TrainingError, match=r"step 1 \(cases case7\): lower training.learning_rate"):
        train_one_weight(settings, bad)


def test_learning_rate_rises_then_falls_to_zero():
    for schedule in ("cosine", "poly"):
        settings = TrainingSettings(steps=100, warmup=0.1, schedule=schedule)
        factors = [learning_rate_factor(step, settings) for step in range(101)]
        assert factors[10] == 1.0
        assert factors[100] == 0.0
        assert factors[:11] == sorted(factors[:11])
        assert factors[10:] == sorted(factors[10:], reverse=True)
    assert learning_rate_factor(55, TrainingSettings(steps=100)) == pytest.approx(0.5)


def tiny_network():
    torch.manual_seed(1)
    layers = [
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv3d(4, 2, 1),
    ]
    return nn.Sequential(*layers)


def noisy(sample):
    return {**sample, "image": sample["image"] + 0.1 * torch.randn_like(sample["image"])}


def cubes(count):
    items = []
    for index in range(count):
        label = torch.zeros(1, 8, 8, 8)
        label[:, 2 : 4 + index % 3, 2:6, 2:6] = 1
        items.append({"image": label.clone(), "label": label, "name": f"cube{index}"})
    return items


def trainer_of(settings, folder=None, workers=0):
    """A trainer of the tiny network with its validation, going on from the checkpoint in `folder`."""
    network = tiny_network()
    task = segmentation(["cube"], (8, 8, 8))
    groups = [{"name": "rest", "params": network.parameters(), "lr": settings.learning_rate}]
    state = TrainingState.create(network, groups, settings)
    if folder and (folder / "last.pt").exists():
        state.load(folder / "last.pt")
    loader = loader_of(cubes(5), state, settings, noisy, workers)
    trainer = build_trainer(task, state, loader, settings, FP32, seed=3)
    evaluator = build_evaluator(task, state.validated, validation_loader(cubes(3), identity), FP32)
    Validation(evaluator, state, settings.validate_every).attach(trainer)
    return trainer, state


def train(folder, settings, stop_at=None, workers=0):
    """Train in `folder`; `stop_at` ends it in the middle of a step, as a kill would."""
    trainer, state = trainer_of(settings, folder, workers)
    MetricsTable(folder / "metrics.csv", state.step).attach(trainer)
    Checkpoints(folder / "best.pt", folder / "last.pt", state, "dice").attach(trainer)
    if stop_at is None:
        trainer.run()
        return state

    @trainer.on(Events.ITERATION_STARTED(once=stop_at))
    def kill():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    return state


def progress_of(settings):
    """Train with a progress bar, or lines."""
    trainer, _ = trainer_of(settings)
    progress = TrainingProgress("dice")
    progress.attach(trainer)
    trainer.run()
    progress.close()


SETTINGS = TrainingSettings(steps=30, batch_size=2, validate_every=7, learning_rate=0.05)


@pytest.mark.parametrize("ema", [0.0, 0.9], ids=["plain", "averaged"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, ema):
    settings = dataclasses.replace(SETTINGS, ema=ema)
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()
    whole = train(folders[0], settings)
    train(folders[1], settings, stop_at=18)
    resumed = train(folders[1], settings)
    for key, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[key]), key
    for key, value in whole.validated.state_dict().items():
        assert torch.equal(value, resumed.validated.state_dict()[key]), key
    assert whole.best == resumed.best
    tables = [(folder / "metrics.csv").read_text().splitlines() for folder in folders]
    assert [row.split(",")[:5] for row in tables[0]] == [row.split(",")[:5] for row in tables[1]]
    assert [row.split(",")[0] for row in tables[0]] == ["step", "7", "14", "21", "28", "30"]


def test_it_learns_and_keeps_the_best(tmp_path):
    state = train(tmp_path, dataclasses.replace(SETTINGS, steps=60))
    assert state.best > 0.9
    network = tiny_network()
    best = tmp_path / "best.pt"
    facts = fill_network(network, read_checkpoint(best), best)
    assert facts["score"] == state.best


def test_worker_processes_change_nothing(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    settings = dataclasses.replace(SETTINGS, steps=6)
    alone, helped = train(tmp_path / "one", settings), train(tmp_path / "two", settings, workers=2)
    for key, value in alone.network.state_dict().items():
        torch.testing.assert_close(value, helped.network.state_dict()[key])


def test_weights_that_are_not_finite_are_never_kept(tmp_path, monkeypatch):
    """The last step diverges: no later loss would show it."""
    settings = dataclasses.replace(SETTINGS, steps=1)
    trainer, state = trainer_of(settings)
    Checkpoints(tmp_path / "best.pt", tmp_path / "last.pt", state, "dice").attach(trainer)

    def diverge():
        with torch.no_grad():
            next(state.network.parameters()).fill_(float("inf"))

    monkeypatch.setattr(state.scheduler, "step", diverge)
    with pytest.raises(TrainingError, match=r"after step 1 the weights .* not finite: lower"):
        trainer.run()
    assert not list(tmp_path.iterdir())


def test_a_changed_byte_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "best.pt"
    write_checkpoint(path, {"format": 1, "network": {"w": torch.arange(1000.0)}})
    assert read_checkpoint(path)["network"]["w"][3] == 3
    content = bytearray(path.read_bytes())
    place = content.index(torch.arange(1000.0).numpy().tobytes()[400:440])
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="wrong checksum"):
        read_checkpoint(path)
