"""Progress of a training towards its end: steps, compute, or a validation plateau."""

import math
from collections.abc import Sequence

from medi3d.engine.clock import Clock
from medi3d.engine.settings import TrainingSettings

FALL = 0.25
"""Length of the plateau schedule's decay, as a fraction of the steps before it."""


def learning_rate_factor(step: float, settings: TrainingSettings) -> float:
    """Fraction of the highest learning rate in optimiser step `step`, counted from 0, of `settings.steps`.

    It rises linearly in the first `warmup` of the steps and then falls to 0 along half a cosine, or as
    (1 - t)^0.9; or, with the schedule "step", to a tenth after each of the fractions `drops` of the steps.
    """
    rising = round(settings.warmup * settings.steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    elapsed = (step - rising) / max(1, settings.steps - rising)
    if settings.schedule == "step":
        return 0.1 ** sum(step >= drop * settings.steps for drop in settings.drops)
    if settings.schedule == "poly":
        return max(0.0, 1 - elapsed) ** 0.9
    return 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed)))


def is_flat(scores: Sequence[float], patience: int, min_gain: float) -> bool:
    """Whether none of the last `patience` scores is more than `min_gain` above the best one before them."""
    before, last = scores[:-patience], scores[-patience:]
    return bool(before) and max(last) <= max(before) + min_gain


class Budget:
    """The end of a training and its learning rate: after `steps`, or sooner where compute is limited.

    With `cpu_seconds` or `gpu_seconds` the schedule follows the fraction of them that is spent. With the
    schedule "plateau" the rate stays up until the validation score is flat, and falls to 0 along half a
    cosine over a quarter of the steps done by then; that is when training ends.
    """

    def __init__(self, settings: TrainingSettings, clock: Clock):
        self.settings, self.clock = settings, clock
        self.flat_at: int | None = None
        """step at which the score was found flat; None: not yet"""

    def position(self, step: int) -> float:
        """Progress after `step` steps, from 0 to `steps` (above: over)."""
        settings = self.settings
        limits = {
            "training_cpu_seconds": settings.cpu_seconds,
            "training_wall_seconds": settings.gpu_seconds,
        }
        if not any(limits.values()):
            return step
        spent = self.clock.read()
        shares = [spent[key] / limit for key, limit in limits.items() if limit]
        return max(step, max(shares) * settings.steps)

    def is_over(self, step: int) -> bool:
        """Whether training ends after `step` steps."""
        return self.position(step) >= (self._end() if self.settings.schedule == "plateau" else self._steps)

    def factor(self, step: int) -> float:
        """Fraction of the highest learning rate in the step after `step` steps."""
        if self.settings.schedule != "plateau":
            return learning_rate_factor(self.position(step), self.settings)
        rising = round(self.settings.warmup * self._steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        begun = self._fall_begins()
        elapsed = (self.position(step) - begun) / (self._end() - begun)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, elapsed))))

    def note_scores(self, step: int, scores: Sequence[float]) -> None:
        """Record the validation scores so far, the last one after `step` steps."""
        settings = self.settings
        undecided = settings.schedule == "plateau" and self.flat_at is None and step < self._fall_begins()
        if undecided and is_flat(scores, settings.patience, settings.min_gain):
            self.flat_at = step

    @property
    def _steps(self) -> int:
        return self.settings.steps

    def _fall_begins(self) -> int:
        return self.flat_at if self.flat_at is not None else int(self._steps / (1 + FALL))

    def _end(self) -> int:
        begun = self._fall_begins()
        return min(self._steps, begun + max(1, round(FALL * begun)))
