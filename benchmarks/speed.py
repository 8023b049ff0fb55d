#!/usr/bin/env python
"""Time and memory of inflated networks against hand-written 5-D ones, and the cost of the proof.

    pip install 'medi3d[peers]'
    benchmarks/speed.py --out speed.json

    pip install --no-deps --target peers timm_3d==1.0.1     # or in a folder of its own
    benchmarks/speed.py --peers peers --repeats 15

The rival is timm_3d: the same architecture, ported by hand to 5-D tensors with zero padding. Both take
turns in this process on the same volume, and a ratio is the median over the turns, so other load on the
machine affects both. Each network is timed in both memory layouts (`.to(memory_format=...)`), since the
user chooses the layout; ratios are given against the rival's plain layout and its faster one. Memory is
the peak of resident memory over one pass, above that before it, each network in a process of its own
(Linux). There every large tensor has a mapping of its own that is returned at once; with `--malloc default`
the C library keeps freed blocks, and the peak depends as much on how later tensors fit into them as on the
network. The proof is timed against its own two forward passes.
"""

import ctypes
import gc
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from medi3d.cli.options import write_json

NETWORKS = ("resnet50", "densenet121", "convnext_tiny", "efficientnet_lite0")
CONTENDERS = ("medi3d", "medi3d channels-last", "timm_3d", "timm_3d channels-last")
PASSES = ("forward", "forward and backward")
PROVEN = "timm:resnet50"
"""The network of about 25 M parameters whose proof is timed."""

MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
"""Setting of glibc: blocks of 256 KiB and more are mapped, and unmapped when they are freed."""

console = Console()


def build(contender: str, network: str) -> Any:
    """One contender's encoder of that architecture: `(B, 1, D, H, W)` -> list of five (four) maps."""
    import torch

    from medi3d import torchvision_shim

    torchvision_shim.install()
    torch.manual_seed(0)
    if contender.startswith("timm_3d"):
        import timm_3d

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = timm_3d.create_model(network, in_chans=1, features_only=True)
    else:
        from medi3d.inflation.network import build as inflate_unproven
        from medi3d.inflation.plan import KernelPlan
        from medi3d.models.sources import build_source

        net = inflate_unproven(build_source(f"timm:{network}"), KernelPlan.isotropic(), in_channels=1)[0]
    if contender.endswith("channels-last"):
        net = net.to(memory_format=torch.channels_last_3d)
    return net


def runner(net: Any, which: str, size: int) -> Callable[[], None]:
    """A function that runs one pass over a volume of size³ voxels."""
    import torch

    volume = torch.randn(1, 1, size, size, size)

    def forward() -> None:
        with torch.no_grad():
            net.eval()(volume)

    def forward_and_backward() -> None:
        sum(level.square().mean() for level in net.train()(volume)).backward()
        net.zero_grad()

    return forward if which == "forward" else forward_and_backward


def time_network(network: str, which: str, size: int, repeats: int) -> dict[str, Any]:
    """Seconds of every contender in turns, and the ratios of medi3d to its rival turn by turn."""
    nets = {contender: build(contender, network) for contender in CONTENDERS}
    parameters = {sum(p.numel() for p in net.parameters()) for net in nets.values()}
    runs = {contender: runner(net, which, size) for contender, net in nets.items()}
    wall: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    cpu: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for turn in range(repeats + 1):
        for contender, run in runs.items():
            started = time.perf_counter(), time.process_time()
            run()
            if turn:  # the first turn prepares kernels
                wall[contender].append(time.perf_counter() - started[0])
                cpu[contender].append(time.process_time() - started[1])

    def ratio(kind: dict[str, list[float]], ours: str, rival: str) -> float:
        return statistics.median(a / b for a, b in zip(kind[ours], kind[rival], strict=True))

    faster = min(CONTENDERS[2:], key=lambda c: statistics.median(cpu[c]))
    return {
        "network": network,
        "pass": which,
        "same_parameters": len(parameters) == 1,
        "seconds": {c: statistics.median(wall[c]) for c in CONTENDERS},
        "cpu_seconds": {c: statistics.median(cpu[c]) for c in CONTENDERS},
        "faster_rival": faster,
        "ratio": {c: ratio(wall, c, "timm_3d") for c in CONTENDERS[:2]},
        "cpu_ratio": {c: ratio(cpu, c, "timm_3d") for c in CONTENDERS[:2]},
        "cpu_ratio_to_faster": {c: ratio(cpu, c, faster) for c in CONTENDERS[:2]},
    }


def status(key: str) -> int:
    """A line of this process's status, in bytes: VmRSS is resident memory, VmHWM its peak."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure_memory(contender: str, network: str, which: str, size: int) -> int:
    """Peak resident bytes of one pass above those before it, in this process, without weights."""
    net = build(contender, network)
    runner(net, which, 64)()  # one-time loading and preparation is not a cost of a pass
    run = runner(net, which, size)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def memory_of(network: str, which: str, size: int, peers: Path | None, malloc: str) -> dict[str, Any]:
    """`measure_memory` of every contender, each in a process of its own."""
    peak = {}
    settings = MAPPED if malloc == "mapped" else {}
    for contender in CONTENDERS:
        task = json.dumps([contender, network, which, size])
        options = ["--peers", str(peers)] if peers else []
        done = subprocess.run(
            [sys.executable, __file__, "--one", task, *options],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        peak[contender] = int(done.stdout.split()[-1])
    return {
        "network": network,
        "pass": which,
        "peak_bytes": peak,
        "ratio": {c: peak[c] / peak["timm_3d"] for c in CONTENDERS[:2]},
    }


def time_proof(repeats: int) -> dict[str, Any]:
    """Seconds of `inflate` on a built 2D network, and of the proof's two forward passes."""
    from medi3d.inflation import inflate
    from medi3d.models.sources import build_source

    net2d = build_source(PROVEN)
    rows = []
    for turn in range(repeats + 1):
        started = time.perf_counter()
        exactness = inflate(net2d, in_channels=1).report.exactness
        if turn:
            rows.append((time.perf_counter() - started, exactness.seconds, exactness.forward_seconds))
    return {
        "network": PROVEN,
        "parameters": sum(p.numel() for p in net2d.parameters()),
        "size": exactness.size,
        "depth": exactness.depth,
        "inflate_seconds": statistics.median(r[0] for r in rows),
        "proof_seconds": statistics.median(r[1] for r in rows),
        "forward_seconds": statistics.median(r[2] for r in rows),
        "ratio": statistics.median(r[0] / r[2] for r in rows),
    }


def errors_of(network: str, depth: int = 128) -> dict[str, Any]:
    """Worst max|3D − 2D| / max|2D| over the levels for two images, each repeated along depth, in float64.

    The rival has medi3d's inflated kernels and its own padding: at the first and last position, and at the
    one in the middle, where it is best. medi3d: at all positions.
    """
    import timm_3d
    import torch

    from medi3d.inflation import inflate
    from medi3d.models.sources import build_source
    from medi3d.weights.load import inflate_state

    torch.manual_seed(0)
    net2d, images = build_source(f"timm:{network}").double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net2d.parameters():
            if (parameter == parameter.flatten()[0]).all():  # a scale of zero or 1e-6 hides its branch
                parameter += 0.3 * torch.randn_like(parameter)
        net2d.train()(images)  # norms with the images' statistics
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rival = timm_3d.create_model(network, in_chans=3, features_only=True).double().eval()
    inflate_state(net2d.eval(), rival)
    volumes = images.unsqueeze(2).repeat(1, 1, depth, 1, 1)
    found: dict[str, Any] = {"network": network, "depth": depth, "timm_3d ends": 0.0, "timm_3d middle": 0.0}
    with torch.inference_mode():
        answers, outputs = net2d(images), rival(volumes)
    for answer, output in zip(answers, outputs, strict=True):
        apart = (output - answer.unsqueeze(2)).abs().amax(dim=(0, 1, 3, 4)) / answer.abs().max()
        found["timm_3d ends"] = max(found["timm_3d ends"], float(apart[[0, -1]].max()))
        found["timm_3d middle"] = max(found["timm_3d middle"], float(apart[len(apart) // 2]))
    found["medi3d"] = inflate(net2d).report.exactness.max_rel_error
    return found


def show(report: dict[str, Any]) -> None:
    """A table for each pass, and a line on the proof."""
    for which in dict.fromkeys(row["pass"] for row in report["time"]):
        table = Table("network", title=f"medi3d / timm_3d, {which}", title_justify="left")
        for heading in ("timm_3d s", "time", "channels-last", "to faster", "memory", "channels-last"):
            table.add_column(heading, justify="right")
        memory = {row["network"]: row["ratio"] for row in report["memory"] if row["pass"] == which}
        for row in (row for row in report["time"] if row["pass"] == which):
            peaks = memory.get(row["network"], {})
            table.add_row(
                row["network"],
                f"{row['seconds']['timm_3d']:.3f}",
                *(f"{row['ratio'][c]:.2f}" for c in CONTENDERS[:2]),
                f"{min(row['cpu_ratio_to_faster'].values()):.2f}",
                *(f"{peaks[c]:.2f}" if peaks else "" for c in CONTENDERS[:2]),
            )
        console.print(table)
    if report["error"]:
        table = Table("network", title="error against the 2D network, boring volumes", title_justify="left")
        headings = ("timm_3d ends", "timm_3d middle", "medi3d")
        for heading in headings:
            table.add_column(heading, justify="right")
        for row in report["error"]:
            table.add_row(row["network"], *(f"{row[heading]:.1e}" for heading in headings))
        console.print(table)
    if proof := report["proof"]:
        console.print(
            f"inflate {proof['network']}: {proof['inflate_seconds']:.2f} s, of which the proof "
            f"{proof['proof_seconds']:.2f} s; its two forward passes take {proof['forward_seconds']:.2f} s; "
            f"ratio {proof['ratio']:.2f}"
        )


def main(
    networks: Annotated[str, typer.Option(help="Names that timm and timm_3d share.")] = ",".join(NETWORKS),
    size: Annotated[int, typer.Option(min=64, help="Edge of the volume, voxels.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Turns; figures are medians over them.")] = 9,
    passes: Annotated[str, typer.Option(help="Which passes to time.")] = ",".join(PASSES),
    peers: Annotated[Path | None, typer.Option(help="Folder of `pip install --target` with timm_3d.")] = None,
    malloc: Annotated[str, typer.Option(help="Memory: mapped, default, or none (time only).")] = "mapped",
    out: Annotated[Path | None, typer.Option(help="Write every figure to this JSON file.")] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, and print the results."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if peers:
        sys.path.append(str(peers))  # behind the environment: its torch and timm are used
    if one:
        print(measure_memory(*json.loads(one)))
        return
    if importlib.util.find_spec("timm_3d") is None:
        raise SystemExit("speed: no timm_3d here: pip install 'medi3d[peers]', or give --peers FOLDER")
    import torch

    report: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "size": size,
        "malloc": malloc,
        "error": [errors_of(network) for network in networks.split(",")],
        "time": [],
        "memory": [],
        "proof": time_proof(repeats),  # first: the networks fragment the heap
    }
    for which in passes.split(","):
        for network in networks.split(","):
            report["time"].append(time_network(network, which, size, repeats))
            if malloc != "none":
                report["memory"].append(memory_of(network, which, size, peers, malloc))
            write_json(out, report)
    report["load_at_end"] = os.getloadavg()
    write_json(out, report)
    show(report)


if __name__ == "__main__":
    typer.run(main)
