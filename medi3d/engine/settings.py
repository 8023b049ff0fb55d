"""The sections `training` and `prediction` of a config."""

from dataclasses import dataclass, field

from medi3d.engine.precision import CHOICES
from medi3d.errors import ConfigError
from medi3d.keys import younger

SCHEDULES = ("cosine", "poly", "plateau", "step")
OPTIMIZERS = ("adamw", "sgd")
MIRROR_AXES = ("depth", "height", "width")
NOT_NEGATIVE = (
    "cpu_seconds",
    "gpu_seconds",
    "encoder_factor",
    "weight_decay",
    "gradient_clip",
    "min_gain",
    "workers",
    "cache_gb",
)


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained: how long, on what, how fast it learns, what it costs.

    Raises:
        ConfigError: a value is out of its range; the message names its key.
    """

    steps: int = 800
    """optimiser steps; an upper limit where training ends by compute or at a plateau"""
    cpu_seconds: float = 0.0
    """end after this many processor seconds of training, in one process; 0: by steps"""
    gpu_seconds: float = 0.0
    """end after this many seconds of training on the GPU, in one process; 0: by steps"""
    batch_size: int = 2
    """samples per step, over all processes"""
    learning_rate: float = 0.01
    """highest learning rate of decoder and head"""
    encoder_factor: float = 0.2
    """learning rate of the encoder, as a multiple of learning_rate"""
    optimizer: str = "adamw"
    """adamw | sgd (momentum 0.9, as I3D was trained)"""
    weight_decay: float = 0.01
    """decoupled with AdamW, part of the gradient with SGD"""
    warmup: float = 0.1
    """fraction of the steps over which the learning rate rises linearly"""
    schedule: str = "cosine"
    """how the learning rate falls after that: cosine | poly (power 0.9) | plateau (constant until the
    validation score is flat, then a cosine over a quarter of the steps done, which ends training) | step (to
    a tenth after each of `drops`)"""
    drops: list[float] = field(default_factory=lambda: [0.5, 0.75])
    """step: fractions of the steps after which the learning rate falls to a tenth"""
    patience: int = 5
    """plateau: validations without a gain after which the score counts as flat"""
    min_gain: float = 0.002
    """plateau: smallest rise of the score that counts as a gain"""
    gradient_clip: float = 12.0
    """largest norm of all gradients together; 0: no limit"""
    ema: float = 0.0
    """decay of the running average of the weights, which is then validated and kept, e.g. 0.99; 0: none"""
    precision: str = "auto"
    """auto | fp32 | bf16; auto: bf16 with channels-last memory where that is faster"""
    checkpoint_activations: bool = younger(False)
    """keep of each block of the network only its input, and compute it again in the backward pass: the same
    gradients in less memory, for about a third more time"""
    validate_every: int = 100
    """steps between validations; each writes a row, a checkpoint and the curves"""
    workers: int = 0
    """processes that load samples; 0: the training process itself"""
    cache_gb: float = 4.0
    """memory in GB for caching cases; 0: read them each time"""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "validate_every", "patience"):
            self._check(key, getattr(self, key) >= 1, "at least 1")
        self._check("learning_rate", self.learning_rate > 0, "above 0")
        for key in NOT_NEGATIVE:
            self._check(key, getattr(self, key) >= 0, "0 or more")
        for key in ("warmup", "ema"):
            self._check(key, 0 <= getattr(self, key) < 1, "at least 0 and below 1")
        self._check("drops", all(0 < drop < 1 for drop in self.drops), "fractions above 0 and below 1")
        self._check("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        self._check("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._check("precision", self.precision in CHOICES, f"one of {', '.join(CHOICES)}")

    def _check(self, key: str, good: bool, right: str) -> None:
        if not good:
            raise ConfigError(f"training.{key} is {getattr(self, key)!r}: it must be {right}")


@dataclass(frozen=True)
class PredictionSettings:
    """How whole cases are predicted and scored (config section `prediction`).

    Raises:
        ConfigError: a value is out of its range; the message names its key.
    """

    window: list[int] | None = None
    """size of sliding windows in voxels, (depth, height, width); null: the patch"""
    overlap: float = 0.5
    """fraction of a window shared with its neighbour, at least 0 and below 1"""
    mirror: list[str] = field(default_factory=list)
    """axes of mirrored copies that are predicted too and averaged: depth, height, width"""
    tolerance: float = 1.0
    """tolerance of the surface Dice in mm"""

    def __post_init__(self) -> None:
        if self.window is not None and (len(self.window) != 3 or min(self.window) < 1):
            raise ConfigError(
                f"prediction.window is {self.window}: three sizes (depth, height, width) in voxels, 1 or more"
            )
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"prediction.overlap is {self.overlap}: at least 0 and below 1")
        unknown = [axis for axis in self.mirror if axis not in MIRROR_AXES]
        if unknown:
            raise ConfigError(f"prediction.mirror has {unknown[0]!r}: {', '.join(MIRROR_AXES)}")
        if not self.tolerance > 0:
            raise ConfigError(f"prediction.tolerance is {self.tolerance}: a distance in mm, above 0")
