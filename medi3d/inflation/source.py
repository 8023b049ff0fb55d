"""Requirements on a user's network before inflation; obstacles are reported in one line."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from medi3d.errors import SourceError
from medi3d.inflation.rules import ConvRule, TransposedConvRule, find_rule, registered_type


@torch.no_grad()
def baked(net2d: nn.Module) -> nn.Module:
    """The network itself, or a copy whose parametrized weights (weight and spectral norm) are plain.

    Values are those of evaluation: spectral norm runs no power iteration.
    """
    if not any(_is_parametrized(module) for module in net2d.modules()):
        return net2d
    computed = [t for m in net2d.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    plain = copy.deepcopy(net2d, {id(tensor): tensor.detach().clone() for tensor in computed})
    modes = [(module, module.training) for module in plain.modules()]
    plain.eval()
    for module in list(plain.modules()):
        _bake(module)
    for module, training in modes:
        module.training = training
    return plain


def _old_norms(module: nn.Module) -> list[WeightNorm | SpectralNorm]:
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))]


def _is_parametrized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or bool(_old_norms(module))


def _bake(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        shared = type(module)  # the original's class too, and baking removes properties from it
        own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, own)
        for name, originals in list(module.parametrizations.items()):  # type: ignore[operator,union-attr]
            trained = any(tensor.requires_grad for tensor in originals.parameters())
            value = getattr(module, name).detach().clone()
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            delattr(module, name)  # now a buffer, if it requires no gradient
            module.register_parameter(name, nn.Parameter(value, trained))
    for hook in _old_norms(module):
        remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
        remove(module, hook.name)


def refuse_own_forward(path: str, layer: nn.Module) -> None:
    """Refuse a convolution whose class overrides the `forward` that its rule replaces.

    Raises:
        SourceError: naming the layer and `register_rule`.
    """
    rule = find_rule(layer)
    if rule is None or not issubclass(rule, (ConvRule, TransposedConvRule)):
        return
    known = registered_type(layer)
    classes = type(layer).__mro__
    before = classes[: classes.index(known)] if known in classes else classes
    own = [c for c in before if {"forward", "_conv_forward"} & vars(c).keys()]
    if own or "forward" in vars(layer):
        kind = (own or [type(layer)])[0].__name__
        raise SourceError(
            f"layer {path!r} ({kind}) is a {known.__name__} with its own forward, which no rule "
            f"covers: write one with @register_rule({kind}) (docs/rules.md)"
        )


def check_outputs(net2d: nn.Module, outputs: Any, images: int) -> None:
    """Refuse outputs that do not have one row for each image; None is ignored.

    Raises:
        SourceError: naming the output.
    """
    found = 0
    for place, output in _leaves(outputs):
        if output is None:
            continue
        found += 1
        if not isinstance(output, Tensor):
            problem = f"of type {type(output).__name__}"
        elif output.dim() == 0:
            problem = "a single number (a loss?)"
        elif 0 in output.shape:
            problem = f"empty, {tuple(output.shape)}: leave out levels that do not exist"
        elif output.shape[0] != images or output.dim() == 1:
            problem = (
                f"{tuple(output.shape)} for {images} images: it does not have one row for each image "
                "(a loss, a grid, views stacked in the batch?)"
            )
        else:
            continue
        raise SourceError(
            f"{type(net2d).__name__} cannot be inflated: its output {place or 'itself'} is {problem}; return "
            "maps (N, C, H, W) or vectors (N, C) only"
        )
    if not found:
        raise SourceError(f"{type(net2d).__name__} cannot be inflated: it returns nothing")


def _leaves(outputs: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(outputs, dict):
        for key, value in outputs.items():
            yield from _leaves(value, f"{place}[{key!r}]")
    elif isinstance(outputs, (list, tuple)):
        for number, value in enumerate(outputs):
            yield from _leaves(value, f"{place}[{number}]")
    else:
        yield place, outputs
