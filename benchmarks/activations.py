#!/usr/bin/env python
"""Peak memory and time of one training step, with and without `medi3d.checkpoint_activations`.

    OMP_NUM_THREADS=1 benchmarks/activations.py --sources inception_v1 --sources timm:resnet50 --size 128

One forward and backward pass of the encoder, or of a segmenter on it, on 1×1×size³ voxels in float32, each in
a process of its own (Linux). The peak is that of resident memory above what is resident before the pass,
with a separate mapping for each large tensor.
Both must give the same gradients: their sum over all parameters is compared to the last bit.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import medi3d
from medi3d.models.encoders import create_encoder


def resident(key: str) -> int:
    """VmRSS, resident memory of this process, or VmHWM, its peak; in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(source: str, size: int, segmenter: bool, checkpointed: bool) -> dict[str, float]:
    """One step of a network from scratch."""
    torch.manual_seed(0)
    network = create_encoder(source, proof=False)
    if segmenter:
        network = medi3d.create_segmenter(network, num_classes=2)
    network.train()
    if checkpointed:
        medi3d.checkpoint_activations(network)
    volume = torch.randn(1, 1, size, size, size)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started = resident("VmRSS"), time.process_time()
    sum(maps.square().mean() for maps in network(volume)).backward()  # type: ignore[union-attr]
    seconds, peak = time.process_time() - started, resident("VmHWM") - before
    gradient = sum(float(p.grad.double().abs().sum()) for p in network.parameters() if p.grad is not None)
    return {"peak_gb": peak / 1e9, "cpu_seconds": seconds, "gradient": gradient}


def main(
    sources: Annotated[list[str], typer.Option(help="inception_v1, timm:NAME, ...")],
    size: Annotated[int, typer.Option(help="voxels along each axis")] = 128,
    segmenter: Annotated[bool, typer.Option(help="with a decoder")] = False,
    one: Annotated[bool | None, typer.Option(hidden=True)] = None,
) -> None:
    if one is not None:
        print(json.dumps(measure(sources[0], size, segmenter, one)))
        return
    for source in sources:
        rows = []
        for flag in ("--no-one", "--one"):
            command = [sys.executable, __file__, "--sources", source, "--size", str(size), flag]
            command += ["--segmenter"] if segmenter else []
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        plain, checkpointed = rows
        assert plain["gradient"] == checkpointed["gradient"], rows
        print(
            f"{source}: {plain['peak_gb']:.2f} GB -> {checkpointed['peak_gb']:.2f} GB, "
            f"{plain['cpu_seconds']:.1f} s -> {checkpointed['cpu_seconds']:.1f} s"
        )


if __name__ == "__main__":
    typer.run(main)
