"""Activation checkpointing: activations recomputed in the backward pass instead of kept, bit-identical.

Sublinear memory: Chen et al. 2016 (arXiv:1604.06174). `torch.utils.checkpoint` does the work, once for each
block of a network. Used by hand around a block of an inflated network, it would recompute the block without
knowing the number of volumes. In any network it would update batch-norm statistics twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from medi3d.errors import SourceError
from medi3d.inflation.fold import resumed, running_calls
from medi3d.inflation.rules.base import adopt

_KERNEL_DIMENSIONS = 2
"""Parameters with at least this many axes belong to layers that map channels to channels."""


def checkpoint_activations(network: nn.Module, enabled: bool = True) -> nn.Module:
    """Keep only the input of each block and recompute the block in the backward pass; in place.

    Gradients, running statistics and random draws are those of plain training. Blocks are the residual,
    Inception or transformer blocks of the network, found by how its modules nest; without gradients, and in
    networks that are compiled or exported, they run unchanged. The cost is about one more forward pass.

    Args:
        network: an encoder, segmenter or classifier.
        enabled: False turns checkpointing off.

    Returns:
        The network itself.

    Raises:
        SourceError: it has no blocks.
    """
    found = blocks(network)
    if not found:
        raise SourceError(
            f"{type(network).__name__} has no blocks of layers, so there is nothing to recompute"
        )
    for block in found:
        if not isinstance(block, CheckpointedBlock):
            adopt(block, CheckpointedBlock)
        block.checkpointed = enabled  # type: ignore[assignment]
    return network


class CheckpointedBlock(nn.Module):
    """A block whose activations are recomputed in the backward pass."""

    checkpointed: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, checkpointed where gradients are recorded."""
        forward = super().forward
        if not self.checkpointed or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        calls = running_calls()
        given, structure = tree_flatten((args, kwargs))  # a list may grow later (DenseNet)
        versions = _versions(given)

        def run(*given: Any) -> Any:
            args, kwargs = tree_unflatten(given, structure)
            with resumed(calls):
                return forward(*args, **kwargs)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _again(self)

        out = checkpoint(run, *given, use_reentrant=False, context_fn=contexts)
        if _versions(given) != versions:
            name = type(self).__name__.removeprefix("CheckpointedBlock_")
            raise SourceError(
                f"{name} changes its input in place, so it cannot be recomputed: train without "
                "checkpoint_activations, or with the layer's inplace=False"
            )
        return out


def _versions(values: Sequence[Any]) -> list[int]:
    """Version counter of each tensor: the number of its in-place changes."""
    return [value._version for value in values if isinstance(value, Tensor)]


@contextmanager
def _again(block: nn.Module) -> Iterator[None]:
    """Around the recomputation of a block: restore its running statistics afterwards."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in block.modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in before:
            buffer.data.copy_(values)  # .data keeps the version: tensors saved by autograd stay valid
            module._buffers[name] = buffer


def blocks(network: nn.Module) -> list[nn.Module]:
    """The modules to checkpoint: the smallest that hold several layers, or a single layer where it is alone.

    Stages and other modules that hold a list of such modules are split into its items.
    """
    found: dict[int, nn.Module] = {}

    def search(module: nn.Module) -> None:
        for child in module.children():
            if not _layers(child):
                continue
            if not _taken_apart(child) and next(child.children(), None) is not None:
                found.setdefault(id(child), child)
            else:
                search(child)

    search(network)
    return list(found.values())


def _taken_apart(module: nn.Module) -> bool:
    """Whether the module never runs as a whole, or is or holds a list of modules with several layers each."""
    return (
        isinstance(module, fx.GraphModule)
        or _runs_no_code(module)
        or any(
            sum(_layers(child) > 1 for child in part.children()) > 1
            for part in module.modules()
            if isinstance(part, nn.Sequential) or _runs_no_code(part)
        )
    )


def _runs_no_code(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleDict) or type(module).forward is nn.Module.forward


def _layers(module: nn.Module) -> int:
    """Convolutions and linear layers in a module."""
    return sum(
        isinstance(weight, Tensor) and weight.dim() >= _KERNEL_DIMENSIONS
        for part in module.modules()
        for weight in part._parameters.values()
    )
