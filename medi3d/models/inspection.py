"""Describe a network under a plan, without weights and without the proof."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from medi3d.inflation.image_sizes import dry_twin, find_sizes, proof_size
from medi3d.inflation.network import Inflated, build, describe_layers
from medi3d.inflation.plan import KernelPlan
from medi3d.inflation.reach import Level
from medi3d.models.artifact import load_artifact
from medi3d.models.sources import build_source


def inspect_source(source: str, plan: KernelPlan, *, in_channels: int = 1, size: int = 96) -> dict[str, Any]:
    """Layers, levels, parameters and operations of a source under a plan, or of an artifact under its own.

    Operations are multiply-adds of one forward on `(1, in_channels, size, size, size)` voxels.
    """
    encoder = _encoder(source, plan, in_channels, size)
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
    """A row with the keys of `medi3d inflate --json`."""
    return {
        "channels": level.channels,
        "stride": level.stride,
        "receptive_field_voxels": level.reach,
    }


def _encoder(source: str, plan: KernelPlan, in_channels: int, size: int) -> Inflated:
    if Path(source).suffix == ".safetensors":
        return load_artifact(source)
    net2d = build_source(source, size=size)
    sizes = find_sizes(net2d)
    encoder, _ = build(net2d, plan, in_channels=in_channels, size=proof_size(net2d, sizes, size))
    encoder.fit_to(sizes)
    return encoder


@torch.no_grad()
def _multiply_adds(encoder: Inflated, size: int) -> int:
    """Count by torch in one run of the network on tensors without data."""
    twin: Any = dry_twin(encoder).requires_grad_(False)  # the counter follows gradients; there are none here
    counter = FlopCounterMode(display=False)
    with counter:
        twin(torch.zeros(1, twin.in_channels, size, size, size, device="meta"))
    return counter.get_total_flops() // 2
