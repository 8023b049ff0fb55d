"""Batch norm after a change of domain: the shift of statistics, measured and corrected."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medi3d.engine.metrics import Row
from medi3d.engine.precision import Precision
from medi3d.models.norms import VolumeNorm, batch_norms

LEAST_VARIANCE = 1e-3
"""Floor for the variance of a normalised channel, for channels that are dead on the volumes."""


@torch.no_grad()
def recalibrate(encoder: nn.Module, volumes: Iterable[Tensor], precision: Precision) -> None:
    """Give the batch norms of an encoder the statistics of these volumes, each `(B, C, D, H, W)`.

    Mean and variance of the batches are averaged, in one pass (AdaBN: Li et al. 2016, arXiv:1603.04779).
    Nothing else changes.
    """
    layers = batch_norms(encoder)
    with _modes_kept(encoder):
        for layer in layers.values():
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # a plain average of all batches
        for volume in volumes:
            with precision.autocast():
                encoder(precision.place(volume))


@contextlib.contextmanager
def _modes_kept(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes and momenta are restored."""
    modes = {module: module.training for module in encoder.modules()}
    momenta = {layer: layer.momentum for layer in batch_norms(encoder).values()}
    encoder.eval()
    try:
        yield
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def measure_drift(encoder: nn.Module, volumes: Iterable[Tensor], precision: Precision) -> list[Row]:
    """How far the encoder's activations on these volumes are from what its norms expect, stage by stage.

    A norm expects its normalised activations to have mean 0 and variance 1 in every channel.

    Args:
        encoder: gives a list of maps.
        volumes: each `(B, C, D, H, W)`, as the encoder takes them.
        precision: device and arithmetic.

    Returns:
        A row for each stage (the layers that a map is the first to depend on): "stage" from 0, the finest;
        "norms"; "shift", root mean square over channels of the mean; "spread", root mean square of the
        logarithm of the variance (0.69: twice, or half, the variance); and the map's "mean" and "deviation".
    """
    stage_of = {name: number for number, names in enumerate(stages(encoder)) for name in names}
    norms = {p: m for p, m in encoder.named_modules() if isinstance(m, VolumeNorm)} | batch_norms(encoder)
    sums = {path: _Moments() for path in norms}
    owner: Any = encoder
    maps = [_Moments() for _ in owner.out_channels]
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, path=path: sums[path].add(_normalised(m, args[0])))
        for path, layer in norms.items()
    ]
    try:
        with _modes_kept(encoder):
            for volume in volumes:
                with precision.autocast():
                    found = encoder(precision.place(volume))
                for moments, part in zip(maps, found, strict=True):
                    moments.add(part)
    finally:
        for hook in hooks:
            hook.remove()
    rows: list[Row] = []
    for number, whole in enumerate(maps):
        inside = [sums[path] for path in norms if _stage(path, norms[path], stage_of) == number]
        shift = [part.mean for part in inside]
        spread = [part.variance.clamp_min(LEAST_VARIANCE).log() for part in inside]
        row: Row = {"stage": number, "norms": len(inside), "shift": _rms(shift), "spread": _rms(spread)}
        deviation = (whole.variance + whole.mean.var(unbiased=False)).sqrt()
        rows.append({**row, "mean": float(whole.mean.mean()), "deviation": float(deviation.mean())})
    return rows


class _Moments:
    """Mean and variance by channel (dimension 1) of all tensors that were added."""

    def __init__(self) -> None:
        self.count, self.sums = 0, [torch.zeros(()), torch.zeros(())]

    def add(self, x: Tensor) -> None:
        flat = x.detach().double().transpose(0, 1).flatten(1).cpu()
        self.count += flat.shape[1]
        self.sums = [self.sums[0] + flat.sum(1), self.sums[1] + flat.square().sum(1)]

    @property
    def mean(self) -> Tensor:
        return self.sums[0] / self.count

    @property
    def variance(self) -> Tensor:
        return (self.sums[1] / self.count - self.mean.square()).clamp_min(0)


def _normalised(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, VolumeNorm):
        return layer.normalise(x.float())
    assert isinstance(layer, _BatchNorm)
    return F.batch_norm(x.float(), layer.running_mean, layer.running_var, eps=layer.eps)


def _stage(path: str, layer: nn.Module, stage_of: dict[str, int]) -> int:
    own = [stage_of[f"{path}.{name}"] for name, _ in layer.named_parameters(recurse=False)]
    return min(own, default=0)


def _rms(parts: Sequence[Tensor]) -> float:
    return float(torch.cat(list(parts)).square().mean().sqrt()) if parts else 0.0


def stages(encoder: nn.Module) -> list[list[str]]:
    """Names of the parameters by the first map (from 0, the finest) that depends on them.

    Found by differentiation, so it holds for any network. Parameters that no map depends on belong to the
    last stage.
    """
    owner: Any = encoder
    asking = {name: p.requires_grad for name, p in encoder.named_parameters()}
    parameters = dict(encoder.named_parameters())
    first = next(iter(parameters.values()))
    size = [2 * side for side in owner.strides[-1]]
    found: list[list[str]] = []
    encoder.requires_grad_(True)
    try:
        with _modes_kept(encoder), torch.enable_grad():
            maps = encoder(first.new_zeros(1, owner.in_channels, *size))
            for part in maps:
                grads = torch.autograd.grad(
                    part.sum(), list(parameters.values()), retain_graph=True, allow_unused=True
                )
                used = [name for name, grad in zip(parameters, grads, strict=True) if grad is not None]
                found.append(used)
                parameters = {name: p for name, p in parameters.items() if name not in used}
                if not parameters:
                    break
    finally:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(asking[name])
    found += [[] for _ in range(len(maps) - len(found))]
    found[-1] += list(parameters)
    return found
