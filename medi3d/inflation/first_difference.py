"""The first module whose output differs: where an inexact network goes wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medi3d.errors import ResourceError, first_line
from medi3d.inflation.exactness import TOLERANCE
from medi3d.inflation.proof_inputs import folded_network, proof_volumes


def first_difference(flat: nn.Module, deep: nn.Module, images: tuple[Tensor, Tensor], depth: int) -> str:
    """The first module, in the order of execution, whose output differs from the 2D output."""
    inner = folded_network(deep)
    expected: dict[str, Tensor] = {}
    with _recording(flat, expected):
        flat(images[0])
    found: dict[str, Tensor] = {}
    problem = ""
    with _recording(inner, found):
        try:
            deep(proof_volumes(images[1], depth)[:2])
        except Exception as error:  # the network's own code may raise anything
            refuse_if_out_of_memory(error)
            problem = first_line(error)
    batch = 2
    for path, output in found.items():
        reference = expected.get(path)
        if reference is None or reference.shape[0] != batch or output.shape[0] % batch:
            continue
        if inner is not deep:
            slices = output.unflatten(0, (batch, -1))
        else:  # a natively 3D network may pool depth away
            slices = output.movedim(2, 1) if output.dim() == 5 else output.unsqueeze(1)
        if slices[:, 0].shape != reference.shape:
            return (
                f"module {path!r} gives {tuple(slices.shape[2:])} where 2D gives {tuple(reference.shape[1:])}"
            )
        difference = (slices - reference.unsqueeze(1)).abs().amax()
        relative = float(difference / reference.abs().amax().clamp_min(1e-300))
        if not relative <= TOLERANCE:
            kind = type(inner.get_submodule(path)).__name__
            return f"module {path!r} ({kind}) differs by {relative:.2g}"
    if problem:
        last = next(reversed(found), "the input")
        return f"running it failed after module {last!r}: {problem}"
    return ""


@contextmanager
def _recording(network: nn.Module, outputs: dict[str, Tensor]) -> Iterator[None]:
    def record(path: str, output: Any) -> None:
        if isinstance(output, Tensor) and path not in outputs:
            outputs[path] = output

    hooks = [
        module.register_forward_hook(lambda m, args, out, path=path: record(path, out))
        for path, module in network.named_modules()
        if path
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_if_out_of_memory(error: Exception) -> None:
    """Raise `ResourceError` if memory ran out, so that this is not reported as a difference."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        raise ResourceError(
            f"too little memory for the proof ({first_line(error)}): "
            "prove fewer levels, or on a larger machine"
        ) from error
