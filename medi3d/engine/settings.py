"""The section `training` of a config."""

from dataclasses import dataclass
from typing import Any

from medi3d.engine.precision import CHOICES
from medi3d.errors import ConfigError

SCHEDULES = ("cosine", "poly")


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained: how long, on what, how fast it learns, what it costs.

    Raises:
        ConfigError: a value is out of its range; the message names its key.
    """

    steps: int = 800
    """optimiser steps in all"""
    batch_size: int = 2
    """samples a step, over all processes together"""
    patch_size: list[int] | None = None
    """training patch in voxels, (depth, height, width); volumes only"""
    window_size: list[int] | None = None
    """largest piece that is predicted at once, in voxels, (depth, height, width); null: patch_size"""
    overlap: float = 0.5
    """share of a prediction window that its neighbour covers too, 0 to 1"""
    foreground: float = 0.5
    """share of training patches that are drawn around a labelled voxel, 0 to 1"""
    learning_rate: float = 0.01
    """highest learning rate, of decoder and head"""
    encoder_factor: float = 0.2
    """learning rate of the encoder, as a multiple of learning_rate"""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay"""
    warmup: float = 0.1
    """share of the steps in which the learning rate rises linearly"""
    schedule: str = "cosine"
    """how the learning rate falls to 0 after that: cosine | poly (power 0.9)"""
    gradient_clip: float = 12.0
    """largest norm of all gradients together; 0: no limit"""
    ema: float = 0.0
    """decay of the running average of the weights that is validated and kept, e.g. 0.99; 0: none"""
    precision: str = "auto"
    """auto | fp32 | bf16; auto: bf16 with channels-last memory where the device is faster so"""
    validate_every: int = 100
    """steps between validations; each writes a row, a checkpoint and the curves"""
    workers: int = 0
    """processes that prepare samples; 0: the training process itself"""
    cache_gb: float = 4.0
    """memory in GB for cases that were read; 0: read each time"""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "validate_every"):
            self._check(key, getattr(self, key) >= 1, "at least 1")
        for key in ("learning_rate",):
            self._check(key, getattr(self, key) > 0, "above 0")
        for key in ("encoder_factor", "weight_decay", "gradient_clip", "workers", "cache_gb"):
            self._check(key, getattr(self, key) >= 0, "0 or more")
        for key in ("overlap", "warmup", "ema"):
            self._check(key, 0 <= getattr(self, key) < 1, "at least 0 and below 1")
        self._check("foreground", 0 <= self.foreground <= 1, "from 0 to 1")
        for key in ("patch_size", "window_size"):
            size = getattr(self, key)
            good = size is None or (len(size) == 3 and min(size) >= 1)
            self._check(key, good, "three positive numbers, (depth, height, width) in voxels")
        self._check("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._check("precision", self.precision in CHOICES, f"one of {', '.join(CHOICES)}")

    def _check(self, key: str, good: bool, right: str) -> None:
        if not good:
            value: Any = getattr(self, key)
            raise ConfigError(f"training.{key}: {value!r} is not allowed; it must be {right}")
