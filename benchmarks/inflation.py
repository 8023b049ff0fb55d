#!/usr/bin/env python
"""Inflate one network of each of timm's families and see whether it is what it says it is.

    benchmarks/inflation.py --families all --out families.json --markdown docs/families.md
    benchmarks/inflation.py --families resnet,swin_transformer

Each family runs in a process of its own, with a limit on time and memory. The smallest published
network of the family is built as a user would build it (`timm:NAME`), and its weights are made
random throughout: norms, layer scales and gates that start at zero or one hide mistakes. It is
inflated with the plan `isotropic`, which proves itself or refuses. Then it is proven once more,
here, without asking it: two different images, each repeated along depth, must give at every
position of every output what the 2D network gives for the image, at depth 8 and at twice the
largest stride along depth (32 at least). A third volume, which changes from one image to the other
in its middle, tells whether slices mix. Exact is a worst error of 1e-9 in float64; inflated without
complaint and not exact is WRONG.
"""

import json
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from medi3d.cli.options import write_json

TOLERANCE = 1e-9
SHALLOW, DEEP = 8, 32
"""Slices of the two proofs; the deep one has more where the stride along depth asks for it."""

GIBIBYTE = 2**30
LARGE = 150e6
"""Parameters above which a network, four times in memory as float64, passes the limit."""


@dataclass
class Row:
    """What one family showed. Strides are voxels per position along depth and in-plane, by output."""

    family: str
    status: str = "refused"
    """exact, refused (with a reason), WRONG (inflated, yet not exact), failed (no answer in time)."""
    model: str = ""
    kind: str = ""
    """features: `timm:NAME`, a list of maps; first levels: of a network above `LARGE`, as few blocks as they
    need; tokens: `forward_features`, where timm has no maps for it."""
    parameters: int = 0
    size: int = 0
    multiple: int = 1
    """Depth must be divisible by it."""
    errors: dict[str, float] = field(default_factory=dict)
    """Depth in slices -> worst max|3D − 2D| / max|2D| over outputs and positions."""
    strides: list[list[int]] = field(default_factory=list)
    mixes_depth: bool = False
    seconds: float = 0.0
    memory: int = 0
    """Peak resident bytes of the process."""
    reason: str = ""

    @property
    def follows(self) -> bool:
        """Whether the stride along depth is the in-plane stride at every output."""
        return bool(self.strides) and all(depth == in_plane for depth, in_plane in self.strides)


def measure(family: str, model: str) -> Row:
    """Build, inflate and prove one network; `model` empty: the family's smallest."""
    from medi3d.errors import Medi3dError, ResourceError

    row, started = Row(family), time.process_time()
    try:
        row.model = model or smallest_member(family)
        _prove(row)
    except Medi3dError as error:
        row.status = "failed" if isinstance(error, ResourceError) else "refused"
        row.reason = str(error)
    except Exception as error:
        row.status, row.reason = "failed", f"{type(error).__name__}: {error}"[:300]
    row.seconds = round(time.process_time() - started, 1)
    row.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def _prove(row: Row) -> None:
    import torch

    from medi3d.inflation.network import inflate
    from medi3d.inflation.tracing import trace

    net2d, row.kind = build(row.model)
    row.parameters = sum(parameter.numel() for parameter in net2d.parameters())
    generator = torch.Generator().manual_seed(0)
    net2d = net2d.double()
    seen = trace(net2d)
    row.size = seen.size
    images = torch.randn(2, seen.channels, seen.size, seen.size, dtype=torch.float64, generator=generator)
    randomise(net2d, images, generator)
    net3d = inflate(net2d, "isotropic").eval()
    with torch.inference_mode():
        answers = tensors(net2d(images))
        row.multiple = depth_multiple(net3d, images)
        deep = max(DEEP, 2 * max(stride[0] for stride in net3d.strides))
        deep += -deep % row.multiple
        for depth in sorted({max(SHALLOW, row.multiple), deep}):
            volumes = images[[0, 1, 0]].unsqueeze(2).repeat(1, 1, depth, 1, 1)
            volumes[2, :, depth // 2 :] = images[1].unsqueeze(1)
            outputs = tensors(net3d(volumes[:2]))
            row.errors[str(depth)] = worst_error(outputs, answers)
        changing = tensors(net3d(volumes[2:]))  # alone: three at once would need half as much memory again
        row.mixes_depth = any(map(_mixes, changing, outputs))
        row.strides = [
            [_checked(level.stride[0], depth, output.shape[2]), level.stride[1]]
            for output, level in zip(outputs, net3d.levels, strict=True)
        ]
    row.status = "exact" if max(row.errors.values()) <= TOLERANCE else "WRONG"


def _checked(stride: int, depth: int, positions: int) -> int:
    """The stride along depth that the network tells of itself, if as many positions are left."""
    if -(-depth // stride) != positions:
        raise AssertionError(f"{positions} positions for {depth} slices, but a stride of {stride} is told")
    return stride


def smallest_member(family: str) -> str:
    """The published network of the family with the fewest parameters; timm's own test models do not count."""
    import timm
    import torch

    sizes: dict[str, int] = {}
    for name in timm.list_models(module=family):
        if not name.startswith("test_"):
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(sizes, key=lambda name: (sizes[name], name))


def build(model: str) -> tuple[Any, str]:
    """The 2D network as medi3d builds it; where timm has no feature maps for it, its `forward_features`."""
    import timm
    import torch

    from medi3d.errors import SourceError
    from medi3d.models.sources import build_source

    with torch.device("meta"):
        large = sum(p.numel() for p in timm.create_model(model).parameters()) > LARGE
    try:
        if large:
            return build_source(f"timm:{model}", levels=3), "first levels"
        return build_source(f"timm:{model}"), "features"
    except SourceError:
        net = timm.create_model(model, num_classes=0)
        net.forward = net.forward_features
        return net, "tokens"


def randomise(net: Any, images: Any, generator: Any) -> None:
    """Let no parameter be zero or the same throughout, and batch norms know the images' statistics."""
    import torch

    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            constant = bool((parameter == parameter.flatten()[0]).all())
            parameter.add_(0.3 * noise if constant else 0.3 * noise * parameter)
        norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # the images' own statistics, not a step towards them
        net(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        net.eval()


def tensors(output: Any) -> list[Any]:
    """Every tensor of a network's output, in order."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(output)


def depth_multiple(net3d: Any, images: Any) -> int:
    """The number of slices, a power of two, that a depth must be divisible by; 1 where any depth will do."""
    for multiple in (1, 2, 4, 8, 16, 32, 64):
        try:
            net3d(images[:1].unsqueeze(2).repeat(1, 1, 3 * multiple, 1, 1))
        except RuntimeError:
            continue
        return multiple
    return 128


def worst_error(outputs: list[Any], answers: list[Any]) -> float:
    """Worst max|3D − 2D| / max|2D| over the outputs, for two volumes of equal slices, at every position."""
    worst = 0.0
    for output, answer in zip(outputs, answers, strict=True):
        scale = float(answer.abs().max())
        apart = float((answer[0] - answer[1]).abs().max())
        if not apart > 1e-6 * scale > 0:
            raise AssertionError("the 2D network answers the same to two images: nothing would be proven")
        error = float((output[:2] - answer.unsqueeze(2)).abs().max()) / scale
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _mixes(changing: Any, boring: Any) -> bool:
    """Whether positions beside the edge between the two images differ from those far from any edge."""
    half = boring.shape[2] // 2
    if half == 0:
        return False
    before = (changing[0, :, :half] - boring[0, :, :half]).abs().max()
    after = (changing[0, :, -half:] - boring[1, :, -half:]).abs().max()
    return bool(max(before, after) > 1e-12 * boring.abs().max())


def run(server: Any, family: str, model: str, seconds: float, gibibytes: float) -> Row:
    """`measure` in a process of its own, forked from one that has timm and torch loaded."""
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=_work, args=(theirs, family, model, seconds, gibibytes))
    process.start()
    theirs.close()
    try:
        if ours.poll(20 * seconds):
            return ours.recv()
        return Row(family, "failed", model, reason=f"no answer in {20 * seconds:g} s of wall time")
    except EOFError:
        process.join()
        code = process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        limits = f"limits: {seconds:g} s of processor time, {gibibytes:g} GiB"
        return Row(family, "failed", model, reason=f"the process ended with {name} ({limits})")
    finally:
        process.kill()
        process.join()


def _work(answer: Any, family: str, model: str, seconds: float, gibibytes: float) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (int(gibibytes * GIBIBYTE),) * 2)
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    answer.send(measure(family, model))


def summary(rows: Iterable[Row]) -> dict[str, int]:
    """The counts that matter."""
    rows = list(rows)
    exact = [row for row in rows if row.status == "exact"]
    return {
        "families": len(rows),
        "exact at both depths": len(exact),
        "of these, stride along depth follows the in-plane stride": sum(row.follows for row in exact),
        "of these, mixing depth": sum(row.mixes_depth for row in exact),
        "refused with a reason": sum(row.status == "refused" for row in rows),
        "no answer in time or memory": sum(row.status == "failed" for row in rows),
        "silently wrong": sum(row.status == "WRONG" for row in rows),
    }


COLUMNS = (
    "family",
    "network",
    "M",
    "size",
    "result",
    "error, shallow",
    "error, deep",
    "stride (depth/in-plane)",
    "follows",
    "mixes",
    "s",
    "GiB",
)


def cells(row: Row) -> list[str]:
    """One row of the table; the reason stands where an exact network has its errors."""
    exact = [f"{error:.0e} ({depth})" for depth, error in row.errors.items()] or ["", ""]
    strides = " ".join(f"{depth}/{in_plane}" for depth, in_plane in row.strides)
    needs = f", depth a multiple of {row.multiple}" if row.multiple > 1 else ""
    return [
        row.family,
        row.model + ("" if row.kind == "features" else f" ({row.kind})"),
        f"{row.parameters / 1e6:.1f}",
        str(row.size),
        f"{row.status}{needs}{row.reason and ': ' + row.reason}",
        exact[0],
        exact[-1],
        strides,
        "yes" if row.follows else "no",
        "yes" if row.mixes_depth else "no",
        f"{row.seconds:.0f}",
        f"{row.memory / GIBIBYTE:.1f}",
    ]


def markdown(rows: list[Row], command: str) -> str:
    """The table of docs/families.md, with counts and the command."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    counts = [f"- {name}: {number}" for name, number in summary(rows).items()]
    return "\n".join([f"    {command}", "", *counts, "", *lines, ""])


BEGIN, END = "<!-- begin: benchmarks/inflation.py -->", "<!-- end: benchmarks/inflation.py -->"


def write_markdown(path: Path, content: str) -> None:
    """Put the table between its marks in the page, or make the page."""
    page = path.read_text() if path.exists() else f"# Families\n\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{content}{END}{after}")


def main(
    families: Annotated[str, typer.Option(help="all, or names joined by commas")] = "all",
    out: Annotated[Path | None, typer.Option(help="rows as JSON, written after each family")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="page to put the table in")] = None,
    resume: Annotated[bool, typer.Option(help="keep the rows that --out has, except failed ones")] = False,
    seconds: Annotated[float, typer.Option(help="limit of processor time for a family")] = 240.0,
    gibibytes: Annotated[float, typer.Option(help="limit of address space for a family")] = 12.0,
) -> None:
    """Inflate and prove one network of each of timm's families."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    from medi3d import torchvision_shim

    torchvision_shim.install()
    import timm

    known = timm.list_modules()
    names = known if families == "all" else families.split(",")
    if set(names) - set(known):
        raise typer.BadParameter(f"timm has no module {', '.join(sorted(set(names) - set(known)))}")
    rows: dict[str, Row] = {}
    if out is not None and out.exists():
        rows = {row["family"]: Row(**row) for row in json.loads(out.read_text())["rows"]}
    models = {name: row.model for name, row in rows.items()}  # found once: the search takes its time
    todo = [name for name in names if not (resume and name in rows and rows[name].status != "failed")]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["medi3d.models.sources", "medi3d.inflation.network"])
    console = Console()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("families", total=len(todo))
        for name in todo:
            progress.update(task, description=name)
            rows[name] = row = run(server, name, models.get(name, ""), seconds, gibibytes)
            progress.console.print(*cells(row))
            progress.advance(task)
            table = [rows[key] for key in sorted(rows)]
            write_json(out, {"summary": summary(table), "rows": [asdict(row) for row in table]})
    shown = [rows[name] for name in sorted(rows) if name in names]
    report = Table(*COLUMNS)
    for row in shown:
        report.add_row(*cells(row), style={"exact": "", "WRONG": "bold red"}.get(row.status, "yellow"))
    console.print(report)
    for name, number in summary(shown).items():
        console.print(f"{name}: {number}")
    if markdown_file is not None:
        write_markdown(markdown_file, markdown(shown, f"benchmarks/inflation.py --families {families}"))


if __name__ == "__main__":
    typer.run(main)
