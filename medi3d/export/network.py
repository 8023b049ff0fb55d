"""Networks as files that run without medi3d: ONNX, torch.export programs, TorchScript.

Each written file is read back and compared with the network on other volumes; a file that disagrees is not
kept. No file contains pickled code.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from medi3d.axes import Triple
from medi3d.errors import InexactError, SourceError, WeightsError
from medi3d.export.torchscript import write_torchscript
from medi3d.files import writing, written_aside

Format = Literal["onnx", "torch", "torchscript"]
SUFFIX: dict[str, str] = {"onnx": ".onnx", "torch": ".pt2", "torchscript": ".pt"}
TOLERANCE = 1e-4
"""Largest max|exported − network| / max|network| of any output, in float32."""


@dataclass(frozen=True)
class ExportReport:
    """The written file, and its error against the network."""

    path: Path
    format: str
    shape: tuple[int, ...]
    """Shape of the export input `(B, C, D, H, W)`; the only shape that it takes unless `dynamic`."""
    dynamic: bool
    """Whether it takes other depths, heights and widths, at least those with the same remainders."""
    any_size: bool
    """Whether it also takes sizes that are not a multiple of the strides."""
    any_batch: bool
    """Whether it takes several volumes at once."""
    max_rel_error: float
    seconds: float
    licences: list[str]
    """Licences of the weights and of all weights that they were trained from; also stored in the file."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "path": str(self.path)}


@torch.no_grad()
def export_network(
    network: nn.Module, out: str | Path, *, to: Format, size: Triple, dynamic: bool = False
) -> ExportReport:
    """Write an encoder, segmenter or classifier; the file appears whole and proven, or not at all.

    Args:
        network: takes `(B, C, D, H, W)` and has `in_channels`, itself or its encoder. It is run in
            evaluation mode and float32, on the CPU, and left in evaluation mode.
        out: the file to write, `.onnx`, `.pt2` or `.pt`.
        to: `onnx`; `torch` for `torch.export.load`; `torchscript` for `torch.jit.load`.
        size: depth, height and width of the input, in voxels. A multiple of the largest stride is
            best: the exporter may fix remainders.
        dynamic: let depth, height and width vary. The exporter then takes minutes instead of seconds;
            TorchScript takes sizes from `size` upwards. Where layers depend on the remainder (TensorFlow's
            "same", tubelets, a segmenter's padding for voxels that an unpadded pool drops) sizes must have
            the remainders of `size`, and such a file refuses others.

    The batch size is free if the exporter supports it. Without `dynamic` every file refuses other sizes.

    Raises:
        SourceError: the exporter cannot take this network, or is not installed.
        InexactError: the file's outputs differ.
        WeightsError: the file cannot be written, or has the wrong suffix.
    """
    out, started = Path(out), time.perf_counter()
    if to not in SUFFIX:
        raise SourceError(f"cannot export to {to!r}: use {', '.join(SUFFIX)}")
    if out.suffix != SUFFIX[to]:
        raise WeightsError(f"a network exported to {to} is a {SUFFIX[to]} file, not {out.name!r}")
    network = network.eval().float().cpu()
    shape = (1, _in_channels(network), *size)
    with writing(out, WeightsError):
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(out) as aside:
            worst, any_size, any_batch = _write_and_compare(network, aside, to, shape, dynamic)
            if not worst <= TOLERANCE:
                raise InexactError(
                    f"{out.name} differs from the network by {worst:.2g} (allowed {TOLERANCE:g})"
                )
    seconds = time.perf_counter() - started
    return ExportReport(out, to, shape, dynamic, any_size, any_batch, worst, seconds, licences_of(network))


def licences_of(network: nn.Module) -> list[str]:
    """Licences of a network's weights and of the weights they came from, from the reports of its parts."""
    reports = (getattr(module, "report", None) for module in network.modules())
    weights = (getattr(report, "weights", None) or {} for report in reports)
    return list(dict.fromkeys(line for facts in weights for line in facts.get("licences", [])))


def _write_and_compare(
    network: nn.Module, path: Path, to: Format, shape: tuple[int, ...], dynamic: bool
) -> tuple[float, bool, bool]:
    """Write the file; return its largest error, and whether it takes any size and any batch."""
    several = (3, *shape[1:])
    try:
        run = _write(network, path, to, shape, dynamic, batch=True)
        worst, any_batch = _difference(network, run, several), True
    except SourceError:  # the exporter fixes the batch of this network
        run = _write(network, path, to, shape, dynamic, batch=False)
        worst, any_batch = 0.0, False
    worst = max(worst, _difference(network, run, shape))
    any_size = False
    if dynamic:
        worst = max(worst, _difference(network, run, _larger(shape, network)))
        with suppress(SourceError):  # refusing is allowed, a wrong output is not
            worst = max(worst, _difference(network, run, (*shape[:2], *(s + 1 for s in shape[2:]))))
            any_size = True
    return worst, any_size, any_batch


Run = Callable[[Tensor], list[Tensor]]
"""An exported file: volume -> its outputs."""


def _write(
    network: nn.Module, path: Path, to: Format, shape: tuple[int, ...], dynamic: bool, *, batch: bool
) -> Run:
    """Export to `path`, with or without a free batch size, and return a function that runs the file."""
    facts = json.dumps(licences_of(network))
    try:
        with warnings.catch_warnings():  # from the exporters' own code; users cannot fix them
            warnings.simplefilter("ignore")
            if to == "torchscript":
                return _write_torchscript(network, path, shape, dynamic, batch, facts)
            axes = (*((0,) if batch else ()), *((2, 3, 4) if dynamic else ()))
            program = torch.export.export(
                network,
                (torch.zeros(2 if batch else 1, *shape[1:]),),
                dynamic_shapes=(dict.fromkeys(axes, Dim.DYNAMIC),) if axes else None,
                strict=False,
            )
            write = _write_torch if to == "torch" else _write_onnx
            return write(program, path, facts)
    except ImportError as error:
        raise SourceError(f"ONNX needs the package {error.name}: pip install 'medi3d[export]'") from error
    except (OSError, SourceError):
        raise
    except Exception as error:  # exporters fail in many ways, each with pages of text
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        name = f"{type(network).__name__} at {tuple(shape)}"
        raise SourceError(f"cannot export {name} to {to}: {type(error).__name__}: {reason}") from error


LICENCES = "licences.json"
"""Name of the file in a program or a TorchScript archive, and of the entry in an ONNX file's metadata."""


def _write_torch(program: ExportedProgram, path: Path, licences: str) -> Run:
    torch.export.save(program, path, extra_files={LICENCES: licences})
    module = torch.export.load(path).module()
    return lambda volume: _listed(module(volume))


def _write_onnx(program: ExportedProgram, path: Path, licences: str) -> Run:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would look up a host
    import onnxruntime

    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    exported.model.metadata_props[LICENCES] = licences
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda volume: [torch.from_numpy(x) for x in session.run(None, {name: volume.numpy()})]


def _write_torchscript(
    network: nn.Module, path: Path, shape: tuple[int, ...], dynamic: bool, batch: bool, licences: str
) -> Run:
    """A trace fixes values that depend on the size; the file refuses sizes where that makes it wrong."""
    larger, odd = _larger(shape, network), (*shape[:2], *(s + 1 for s in shape[2:]))
    step = tuple(b - a for a, b in zip(shape[2:], larger[2:], strict=True))

    def is_right(run: Run, other: Sequence[int]) -> bool:
        try:
            return _difference(network, run, other) <= TOLERANCE
        except SourceError:
            return False

    def steps(run: Run) -> tuple[int, ...] | None:
        """Step between the sizes at which it is right, in voxels per axis; None: only at its own size."""
        if not dynamic:
            return None
        by_axis = [tuple(b if i == axis else a for i, (a, b) in enumerate(zip(shape, larger, strict=True)))
                   for axis in (2, 3, 4)]  # fmt: skip
        if not all(is_right(run, other) for other in (larger, *by_axis)):
            raise SourceError(
                f"TorchScript fixes {type(network).__name__} to one size: leave out --dynamic, or export "
                "to torch or onnx"
            )
        return (1, 1, 1) if is_right(run, odd) else step

    return write_torchscript(network, path, shape, steps, batch=batch, extra={LICENCES: licences})


def _larger(shape: Sequence[int], network: nn.Module) -> tuple[int, ...]:
    """Larger along every axis by the deepest level's stride."""
    owner: Any = getattr(network, "encoder", network)
    return (*shape[:2], *(s + t for s, t in zip(shape[2:], owner.strides[-1], strict=True)))


def _difference(network: nn.Module, run: Run, shape: Sequence[int]) -> float:
    volume = torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = _listed(network(volume))
    try:
        found = run(volume)
    except Exception as error:  # onnxruntime's errors share no base class
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise SourceError(f"the exported network does not take {tuple(shape)}: {reason}") from error
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
        for a, b in zip(found, expected, strict=True)
    )


def _listed(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _in_channels(network: nn.Module) -> int:
    owner: Any = getattr(network, "encoder", network)
    return owner.in_channels
