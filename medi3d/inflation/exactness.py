"""What the proof of exactness found, level by level."""

from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 1e-9
"""Largest max|3D − 2D| / max|2D| that counts as exact. Rounding in float64 stays far below it."""


@dataclass(frozen=True)
class LevelReport:
    """One output of the network."""

    channels: int
    stride: tuple[int, ...]
    """Voxels per position as (depth, height, width); (depth,) where the output is a vector."""
    max_rel_error: float
    """Worst over depth positions, depth padded by replication."""
    border_rel_error: float
    """At the first and last depth position, with the plan's own padding."""


@dataclass
class ExactnessReport:
    """How far a 3D network is from its 2D source on boring volumes."""

    levels: list[LevelReport] = field(default_factory=list)
    mixes_depth: bool = False
    """Whether a position depends on slices before or after its own, with these weights.

    Measured with a volume whose slices change; parameters shared with the 2D network are randomised where
    they were constant.
    """
    can_mix_depth: bool = False
    """Whether it would with random values in parameters that the 2D network lacks or has in another shape.

    Kernels with all weight in the middle tap, a k×1×1 convolution that starts as identity and an attention
    over depth whose last layer is zero do not mix slices until they are trained.
    """
    size: int | tuple[int, int] = 0
    """Height and width of the images in pixels; one number where they are equal."""
    depth: int = 0
    seconds: float = 0.0
    """Duration of the whole proof."""
    forward_seconds: float = 0.0
    """Time within `seconds` spent in the forward passes that are compared: one 2D, one 3D."""
    failure: str = ""
    """Empty, or the first module that differs and how."""

    @property
    def max_rel_error(self) -> float:
        """Worst over levels and depth positions; infinite if the network could not run."""
        return max((level.max_rel_error for level in self.levels), default=float("inf"))

    @property
    def exact(self) -> bool:
        """Whether the proof holds."""
        return not self.failure and self.max_rel_error <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        levels = [dict(vars(level)) for level in self.levels]
        return {
            "levels": levels,
            "max_rel_error": self.max_rel_error,
            "mixes_depth": self.mixes_depth,
            "can_mix_depth": self.can_mix_depth,
            "proof": {
                "size": self.size,
                "depth": self.depth,
                "seconds": round(self.seconds, 3),
                "forward_seconds": round(self.forward_seconds, 3),
                "tolerance": TOLERANCE,
                "failure": self.failure,
            },
        }
