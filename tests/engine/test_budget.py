"""When training ends and how the learning rate falls: by steps, by compute, on a plateau."""

import pytest

from medi3d.engine.budget import Budget, is_flat, learning_rate_factor
from medi3d.engine.settings import TrainingSettings
from medi3d.errors import ConfigError


class Spent:
    """A clock that shows what it is told."""

    def __init__(self, **seconds: float):
        self.seconds = {"training_cpu_seconds": 0.0, "training_wall_seconds": 0.0, **seconds}

    def read(self):
        return self.seconds


def test_without_a_limit_steps_count():
    settings = TrainingSettings(steps=10)
    budget = Budget(settings, Spent(training_cpu_seconds=1e9))
    for step in range(11):
        assert budget.factor(step) == learning_rate_factor(step, settings)
    assert [step for step in range(12) if budget.is_over(step)] == [10, 11]


@pytest.mark.parametrize("key", ["cpu_seconds", "gpu_seconds"])
def test_half_of_the_compute_is_half_of_the_schedule(key):
    settings = TrainingSettings(steps=1000, **{key: 60.0})
    clock = Spent()
    budget = Budget(settings, clock)
    spent = "training_cpu_seconds" if key == "cpu_seconds" else "training_wall_seconds"
    clock.seconds[spent] = 30.0
    assert budget.position(7) == 500
    assert budget.factor(7) == learning_rate_factor(500, settings)
    assert not budget.is_over(7)
    clock.seconds[spent] = 60.0
    assert budget.is_over(7)
    assert budget.factor(7) == pytest.approx(0)


@pytest.mark.parametrize(
    ("scores", "flat"),
    [([0.5, 0.6, 0.7], False), ([0.7, 0.7, 0.7], True), ([0.7, 0.6, 0.7009], True), ([0.7, 0.6], False)],
    ids=["rising", "level", "within the gain", "too few"],
)
def test_flat(scores, flat):
    assert is_flat(scores, patience=2, min_gain=0.001) == flat


def test_a_plateau_lets_the_rate_fall_over_a_quarter_of_the_steps():
    budget = Budget(TrainingSettings(steps=1000, warmup=0.0, schedule="plateau", patience=1), Spent())
    budget.note_scores(100, [0.5, 0.8])
    budget.note_scores(200, [0.5, 0.8, 0.8])
    budget.note_scores(250, [0.5, 0.8, 0.8, 0.8])
    assert budget.flat_at == 200
    assert [budget.factor(step) for step in (199, 200, 225)] == [1, 1, pytest.approx(0.5)]
    assert [step for step in (249, 250) if budget.is_over(step)] == [250]


def test_a_score_that_never_levels_ends_at_the_last_step():
    budget = Budget(TrainingSettings(steps=1000, warmup=0.0, schedule="plateau"), Spent())
    assert budget.factor(800) == 1
    assert budget.factor(1000) == pytest.approx(0)
    assert budget.is_over(1000)
    assert not budget.is_over(999)


def test_a_negative_budget_is_refused():
    with pytest.raises(ConfigError, match=r"training.cpu_seconds is -1"):
        TrainingSettings(cpu_seconds=-1)
