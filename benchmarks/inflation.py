#!/usr/bin/env python
"""Inflate one network of each timm family and check that the result is exact.

    benchmarks/inflation.py --families all --out families.json --markdown docs/families.md
    benchmarks/inflation.py --families resnet,swin_transformer
    benchmarks/inflation.py --families all --segmenter --out segmenters.json --resume

Each family runs in a process of its own, with a limit on time and memory. The smallest published
network of the family is built as a user would build it (`timm:NAME`), and all its weights are made
random: norms, layer scales and gates that start at zero or one hide mistakes. `inflate` with the plan
`isotropic` proves its result or refuses. This script then proves it again, independently: two different
images, each repeated along depth, must give at every position of every output what the 2D network gives
for the image, at depth 8 and at twice the largest stride along depth (32 at least). A third volume, which
changes from one image to the other in its middle, shows whether slices mix. Exact means a worst error of
at most 1e-9 in float64; inflated without an error but not exact is WRONG.

With --segmenter a segmenter is built on each instead, as a user would (`create_segmenter` with the size of
the patch), and trained for one step on a patch of noise: it must give logits for every voxel, and a finite
gradient must change its weights. A refusal in one line is listed as refused; any other exception is a
TRACEBACK.
"""

import json
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from medi3d.cli.options import write_json

TOLERANCE = 1e-9
SHALLOW, DEEP = 8, 32
"""Slices of the two proofs; the deep one has more where the stride along depth requires it."""

GIBIBYTE = 2**30
LARGE = 150e6
"""Number of parameters above which four float64 copies of a network exceed the memory limit."""


@dataclass
class Row:
    """Result of one family. Strides are voxels per position along depth and in-plane, by output."""

    family: str
    status: str = "refused"
    """exact, refused (with a reason), WRONG (inflated, but not exact), failed (no result in time)."""
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

    def cells(self) -> list[str]:
        """One row of the table; the reason takes the place of the errors of an exact network."""
        exact = [f"{error:.0e} ({depth})" for depth, error in self.errors.items()] or ["", ""]
        strides = " ".join(f"{depth}/{in_plane}" for depth, in_plane in self.strides)
        needs = f", depth a multiple of {self.multiple}" if self.multiple > 1 else ""
        return [
            self.family,
            self.model + ("" if self.kind == "features" else f" ({self.kind})"),
            f"{self.parameters / 1e6:.1f}",
            str(self.size),
            f"{self.status}{needs}{self.reason and ': ' + self.reason}",
            exact[0],
            exact[-1],
            strides,
            "yes" if self.follows else "no",
            "yes" if self.mixes_depth else "no",
            f"{self.seconds:.0f}",
            f"{self.memory / GIBIBYTE:.1f}",
        ]


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
        changing = tensors(net3d(volumes[2:]))  # one at a time: three at once would need 1.5 times the memory
        row.mixes_depth = any(map(_mixes, changing, outputs))
        row.strides = [
            [_checked(level.stride[0], depth, output.shape[2]), level.stride[1]]
            for output, level in zip(outputs, net3d.levels, strict=True)
        ]
    row.status = "exact" if max(row.errors.values()) <= TOLERANCE else "WRONG"


def _checked(stride: int, depth: int, positions: int) -> int:
    """The stride along depth that the network reports, if the number of positions matches it."""
    if -(-depth // stride) != positions:
        raise AssertionError(f"{positions} positions for {depth} slices, but a reported stride of {stride}")
    return stride


def smallest_member(family: str) -> str:
    """The published network of the family with the fewest parameters, without timm's own test models."""
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
    """Make no parameter zero or constant, and give batch norms the images' statistics."""
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
    """The number of slices, a power of two, that a depth must be divisible by; 1 where any depth works."""
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
            raise AssertionError("the 2D network does not distinguish two images: nothing would be proven")
        error = float((output[:2] - answer.unsqueeze(2)).abs().max()) / scale
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _mixes(changing: Any, boring: Any) -> bool:
    """Whether positions next to the edge between the two images differ from those far from any edge."""
    half = boring.shape[2] // 2
    if half == 0:
        return False
    before = (changing[0, :, :half] - boring[0, :, :half]).abs().max()
    after = (changing[0, :, -half:] - boring[1, :, -half:]).abs().max()
    return bool(max(before, after) > 1e-12 * boring.abs().max())


@dataclass
class SegmenterRow:
    """Result of a segmenter on one family."""

    family: str
    status: str = "refused"
    """trained, refused (with a reason), TRACEBACK, failed (no result in time or memory)."""
    model: str = ""
    parameters: int = 0
    patch: str = ""
    """Voxels, depth × height × width."""
    padded: str = ""
    """Size to which the encoder pads the patch, where it does."""
    strides: list[list[int]] = field(default_factory=list)
    proof: float | None = None
    """Worst max|3D − 2D| / max|2D| of the encoder's own proof; None without the proof."""
    seconds: float = 0.0
    memory: int = 0
    reason: str = ""

    def cells(self) -> list[str]:
        """One row of the table."""
        return [
            self.family,
            self.model,
            f"{self.parameters / 1e6:.1f}",
            self.patch + (f" in {self.padded}" if self.padded else ""),
            f"{self.status}{self.reason and ': ' + self.reason}",
            "" if self.proof is None else f"{self.proof:.0e}",
            " ".join("/".join(map(str, dict.fromkeys(stride))) for stride in self.strides),
            f"{self.seconds:.0f}",
            f"{self.memory / GIBIBYTE:.1f}",
        ]


SEGMENTER_COLUMNS = (
    *("family", "network", "M", "patch", "result", "error of the proof"),
    *("stride (depth/in-plane)", "s", "GiB"),
)


def measure_segmenter(family: str, model: str, patch: list[int], channels: int, proof: bool) -> SegmenterRow:
    """Build a segmenter on one network and train it for a step; `model` empty: the family's smallest."""
    from medi3d.errors import Medi3dError, ResourceError

    row, started = SegmenterRow(family, patch="×".join(map(str, patch))), time.process_time()
    try:
        row.model = model or smallest_member(family)
        _train_a_step(row, patch, channels, proof)
    except Medi3dError as error:
        row.status = "failed" if isinstance(error, ResourceError) else "refused"
        row.reason = str(error)
    except MemoryError:
        row.status, row.reason = "failed", "too little memory"
    except Exception as error:
        lacks_memory = "allocate memory" in str(error)
        row.status = "failed" if lacks_memory else "TRACEBACK"
        row.reason = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
    row.seconds = round(time.process_time() - started, 1)
    row.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def _train_a_step(row: SegmenterRow, patch: list[int], channels: int, proof: bool) -> None:
    import torch

    from medi3d.models.networks import create_segmenter

    torch.manual_seed(0)
    network: Any = create_segmenter(
        f"timm:{row.model}", num_classes=3, in_channels=channels, size=max(patch[1:]), proof=proof
    ).train()
    row.parameters = sum(parameter.numel() for parameter in network.parameters())
    row.strides = [list(stride) for stride in network.encoder.strides]
    row.proof = network.encoder.report.max_rel_error if proof else None
    fitted = network.encoder.sizes.fit(patch)
    row.padded = "" if fitted == patch else "×".join(map(str, fitted))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    logits = network(torch.randn(1, channels, *patch))
    if logits.shape != (1, 3, *patch):
        raise AssertionError(f"logits {tuple(logits.shape)} for a patch {tuple(patch)}")
    torch.nn.functional.cross_entropy(logits, torch.randint(3, (1, *patch))).backward()
    sizes = [float(p.grad.abs().sum()) for p in network.encoder.parameters() if p.grad is not None]
    if not sizes or not 0 < sum(sizes) < float("inf"):
        raise AssertionError(f"the gradient of the encoder's {len(sizes)} tensors adds up to {sum(sizes)}")
    optimizer.step()
    row.status = "trained"


def segmenter_summary(rows: Iterable[SegmenterRow]) -> dict[str, int]:
    """The counts of the summary."""
    statuses = [row.status for row in rows]
    return {
        "families": len(statuses),
        "segmenter trained for a step": statuses.count("trained"),
        "refused with a reason": statuses.count("refused"),
        "no answer in time or memory": statuses.count("failed"),
        "tracebacks": statuses.count("TRACEBACK"),
    }


def run(server: Any, work: Callable[[], Any], seconds: float, gibibytes: float) -> Any:
    """Result of `work` in a process of its own, forked from one that has timm and torch loaded.

    Raises:
        TimeoutError, MemoryError: no result within these limits.
    """
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=_work, args=(theirs, work, seconds, gibibytes))
    process.start()
    theirs.close()
    try:
        if ours.poll(20 * seconds):
            return ours.recv()
        raise TimeoutError(f"no result in {20 * seconds:g} s of wall time")
    except EOFError:
        process.join()
        code = process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        limits = f"limits: {seconds:g} s of processor time, {gibibytes:g} GiB"
        raise MemoryError(f"the process ended with {name} ({limits})") from None
    finally:
        process.kill()
        process.join()


def _work(answer: Any, work: Callable[[], Any], seconds: float, gibibytes: float) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (int(gibibytes * GIBIBYTE),) * 2)
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    answer.send(work())


def summary(rows: Iterable[Row]) -> dict[str, int]:
    """The counts of the summary."""
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


@dataclass(frozen=True)
class Sweep:
    """What to do with each family, and how to show it."""

    row: Callable[..., Any]
    columns: tuple[str, ...]
    summary: Callable[[Iterable[Any]], dict[str, int]]
    mark: str
    """Marks the place of the table in the page."""
    good: str
    """Status of a row that is not highlighted."""


INFLATION = Sweep(Row, COLUMNS, summary, "benchmarks/inflation.py", "exact")
SEGMENTER = Sweep(
    SegmenterRow, SEGMENTER_COLUMNS, segmenter_summary, "benchmarks/inflation.py --segmenter", "trained"
)


def markdown(rows: list[Any], command: str, sweep: Sweep = INFLATION) -> str:
    """The table of docs/families.md, with counts and the command."""
    lines = ["| " + " | ".join(sweep.columns) + " |", "|" + "---|" * len(sweep.columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |" for row in rows]
    counts = [f"- {name}: {number}" for name, number in sweep.summary(rows).items()]
    return "\n".join([f"    {command}", "", *counts, "", *lines, ""])


def write_markdown(path: Path, content: str, mark: str = INFLATION.mark) -> None:
    """Put the table between its marks in the page, or create the page."""
    begin, end = f"<!-- begin: {mark} -->", f"<!-- end: {mark} -->"
    page = path.read_text() if path.exists() else f"# Families\n\n{begin}\n{end}\n"
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{content}{end}{after}")


def main(
    families: Annotated[str, typer.Option(help="all, or names separated by commas")] = "all",
    out: Annotated[Path | None, typer.Option(help="rows as JSON, written after each family")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="page to put the table in")] = None,
    resume: Annotated[bool, typer.Option(help="keep the rows that --out has, except failed ones")] = False,
    seconds: Annotated[float, typer.Option(help="limit of processor time per family")] = 240.0,
    gibibytes: Annotated[float, typer.Option(help="limit of address space per family")] = 12.0,
    segmenter: Annotated[bool, typer.Option("--segmenter", help="train a segmenter on each instead")] = False,
    patch: Annotated[str, typer.Option(help="with --segmenter: depth,height,width in voxels")] = "96,96,96",
    channels: Annotated[int, typer.Option(help="with --segmenter: channels of the volume")] = 1,
    proof: Annotated[bool, typer.Option(help="with --segmenter: prove the encoder")] = True,
) -> None:
    """Inflate and prove one network of each of timm's families, or train a segmenter on each."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    import timm

    known = timm.list_modules()
    names = known if families == "all" else families.split(",")
    if set(names) - set(known):
        raise typer.BadParameter(f"timm has no module {', '.join(sorted(set(names) - set(known)))}")
    sweep = SEGMENTER if segmenter else INFLATION
    rows: dict[str, Any] = {}
    if out is not None and out.exists():
        rows = {row["family"]: sweep.row(**row) for row in json.loads(out.read_text())["rows"]}
    models = {name: row.model for name, row in rows.items()}  # found once: the search is slow
    todo = [name for name in names if not (resume and name in rows and rows[name].status != "failed")]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["medi3d.models.sources", "medi3d.inflation.network"])
    console = Console()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("families", total=len(todo))
        for name in todo:
            progress.update(task, description=name)
            work = partial(measure, name, models.get(name, ""))
            if segmenter:
                voxels = [int(size) for size in patch.split(",")]
                work = partial(measure_segmenter, name, models.get(name, ""), voxels, channels, proof)
            try:
                row = run(server, work, seconds, gibibytes)
            except (TimeoutError, MemoryError) as error:
                row = sweep.row(name, "failed", models.get(name, ""), reason=str(error))
            rows[name] = row
            progress.console.print(*row.cells())
            progress.advance(task)
            table = [rows[key] for key in sorted(rows)]
            write_json(out, {"summary": sweep.summary(table), "rows": [asdict(row) for row in table]})
    shown = [rows[name] for name in sorted(rows) if name in names]
    report = Table(*sweep.columns)
    for row in shown:
        style = "" if row.status == sweep.good else "bold red" if row.status.isupper() else "yellow"
        report.add_row(*row.cells(), style=style)
    console.print(report)
    for name, number in sweep.summary(shown).items():
        console.print(f"{name}: {number}")
    if markdown_file is not None:
        command = f"benchmarks/inflation.py --families {families}"
        if segmenter:
            command += f" --segmenter --patch {patch} --channels {channels}{'' if proof else ' --no-proof'}"
        write_markdown(markdown_file, markdown(shown, command, sweep), sweep.mark)


if __name__ == "__main__":
    typer.run(main)
