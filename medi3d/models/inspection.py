"""What a network would be under a plan, without weights and without the proof."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from medi3d.inflation.network import Inflated, build, describe_layers
from medi3d.inflation.plan import KernelPlan
from medi3d.inflation.reach import Level
from medi3d.models.artifact import load_artifact
from medi3d.models.sources import build_source


def inspect_source(source: str, plan: KernelPlan, *, in_channels: int = 1, size: int = 96) -> dict[str, Any]:
    """Layers, levels, parameters and operations of a source under a plan, or of an artifact under its own.

    Operations are multiply-adds of one forward on `(1, in_channels, size, size, size)` voxels.
    """
    encoder = _encoder(source, plan, in_channels)
    return {
        "source": source,
        "plan": encoder.plan.to_dict(),
        "profile": encoder.profile,
        "layers": [asdict(layer) for layer in describe_layers(encoder)],
        "levels": [_level(level) for level in encoder.levels],
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "size": size,
        "multiply_adds": _multiply_adds(encoder, size),
    }


def _level(level: Level) -> dict[str, Any]:
    """A row under the names that `medi3d inflate --json` has too."""
    return {
        "channels": level.channels,
        "stride": level.stride,
        "receptive_field_voxels": level.reach,
    }


def _encoder(source: str, plan: KernelPlan, in_channels: int) -> Inflated:
    if Path(source).suffix == ".safetensors":
        return load_artifact(source)
    return build(build_source(source), plan, in_channels=in_channels)[0]


@torch.no_grad()
def _multiply_adds(encoder: Inflated, size: int) -> int:
    """Counted by torch while the network runs once."""
    counter = FlopCounterMode(display=False)
    with counter:
        encoder.eval()(torch.zeros(1, encoder.in_channels, size, size, size))
    return counter.get_total_flops() // 2
