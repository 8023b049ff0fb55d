"""Networks and volumes prepared for the proof: float64, nothing hidden by zeros, deep enough."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from medi3d.errors import ShapeError
from medi3d.inflation.fold import Fold
from medi3d.inflation.kernels import adapt_channels, inflate_kernel

DEEPEST = 256
"""Depth of the deepest volume that a proof chooses, in slices."""


def in_double(network: nn.Module) -> nn.Module:
    """A copy in float64, made in one step: a large network is not copied twice."""
    tensors = [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]
    return copy.deepcopy(network, {id(t): _twin(t) for t in tensors})


def _twin(tensor: Tensor) -> Tensor:
    twin = tensor.detach().to(torch.float64, copy=True)
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def adapt_stems(flat: nn.Module, deep: nn.Module, precision: torch.dtype) -> None:
    """Give the 2D network the channels of the 3D one, so that it is compared with its own channel sums.

    The sum is taken in the precision of the weights: in float32 it is rounded once, in both networks.
    """
    source, target = _first_kernel_channels(flat), _first_kernel_channels(deep)
    twins = dict(folded_network(deep).named_parameters())
    for name, parameter in flat.named_parameters():
        twin = twins.get(name)
        if twin is None or (parameter.dim(), twin.dim()) != (4, 5):
            continue
        if (parameter.shape[1], twin.shape[1]) == (source, target) and source != target:
            parameter.data = adapt_channels(parameter.data.to(precision), target).double()


def proof_images(
    flat: nn.Module, deep: nn.Module, size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two different images for each network; grey if their numbers of channels still differ."""
    source, target = _first_kernel_channels(flat), _first_kernel_channels(deep)
    if source != target:  # not adapted: the 2D network regroups its channels before its first convolution
        source = getattr(deep, "image_channels", source)
    channels = source if source == target else 1
    images = torch.randn(2, channels, *size, dtype=torch.float64, generator=generator)
    return images.expand(2, source, -1, -1).clone(), images.expand(2, target, -1, -1).clone()


def proof_volumes(images: Tensor, depth: int) -> Tensor:
    """Both images repeated along depth, and one that changes from first to second: `(3, C, D, H, W)`."""
    volumes = images[[0, 1, 0]].unsqueeze(2).repeat(1, 1, depth, 1, 1)
    volumes[2, :, edge(depth) :] = images[1].unsqueeze(1)
    return volumes


def edge(depth: int) -> int:
    """The first slice of the second image in the changing volume."""
    return depth // 2


def proof_depth(deep: nn.Module, images: Tensor) -> int:
    """Twice the largest stride along depth, at least 8: from its rules, else measured on 32 slices.

    A network that returns to the image's resolution gets two positions at its deepest level, and an odd
    depth, which it must restore.
    """
    deepest = 1
    if folded_network(deep) is not deep:
        stride = max((level[0] for level in deep.strides), default=1)  # type: ignore[union-attr]
        deepest = getattr(deep, "deepest", (1, 1, 1))[0]
    else:
        probe = 32
        outputs = feature_maps(deep, images[:1].unsqueeze(2).repeat(1, 1, probe, 1, 1))
        stride = max(-(-probe // max(output.shape[2], 1)) for output in outputs)
    return min(DEEPEST, max(8, 2 * stride, deepest + 1 if deepest > stride else 0))


def unhide(flat: nn.Module, deep: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Add the same random numbers to corresponding parameters, so that no branch is multiplied by zero.

    Values are added, not set, so a parameter that differs between the networks still differs afterwards.
    """
    twins = dict(folded_network(deep).named_parameters())
    layers: dict[str, Any] = dict(folded_network(deep).named_modules())
    for name, parameter in flat.named_parameters():
        twin = twins.get(name)
        if twin is None:
            continue
        constant = bool((parameter == parameter.flatten()[0]).all())
        if not constant and parameter.dim() > 1:
            continue
        change = 0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        if twin.shape == parameter.shape:
            parameter.add_(change)
            twin.add_(change)
        elif twin.dim() == 5 and twin.shape[:2] == parameter.shape[:2]:
            parameter.add_(change)
            spread = getattr(layers[name.rpartition(".")[0]], "spread", None)
            twin.add_(spread(change) if spread else inflate_kernel(change, twin.shape[2]))
    _calibrate(flat, folded_network(deep), images)


def _calibrate(flat: nn.Module, deep: nn.Module, images: Tensor) -> None:
    """Move batch-norm statistics to those of the images, by the same difference in both networks."""
    norms: dict[str, Any] = {
        name: module
        for name, module in flat.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }
    before = {n: (m.running_mean.clone(), m.running_var.clone(), m.momentum) for n, m in norms.items()}
    for norm in norms.values():
        norm.train()
        norm.momentum = 0.9
    flat(images)
    twins: dict[str, Any] = dict(deep.named_modules())
    for name, norm in norms.items():
        mean, variance, norm.momentum = before[name]
        norm.eval()
        twin = twins.get(name)
        if twin is not None and getattr(twin, "running_mean", None) is not None:
            twin.running_mean.add_(norm.running_mean - mean)
            twin.running_var.add_(norm.running_var - variance)


def folded_network(network: nn.Module) -> nn.Module:
    """The folded 2D network inside an inflated one; any other network itself."""
    return network.network if isinstance(getattr(network, "fold", None), Fold) else network  # type: ignore[return-value]


def _first_kernel_channels(network: nn.Module) -> int:
    known = getattr(network, "in_channels", None)
    if folded_network(network) is network:  # trust the weights: a stem may have been adapted
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
                return layer.weight.shape[1] * layer.groups
    if isinstance(known, int):
        return known
    raise ShapeError(f"{type(network).__name__} has no convolution, so its input channels are not known")


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output, at any nesting."""
    if isinstance(output, Tensor):
        return [output]
    if output is None:
        return []
    if not isinstance(output, (dict, list, tuple)):
        raise ShapeError(f"a network returned {type(output).__name__}; tensors, lists and dicts are compared")
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_of(value)]


def feature_maps(deep: nn.Module, volumes: Tensor) -> list[Tensor]:
    """Outputs of a 3D network; where depth is pooled away, `(B, C)` becomes one position, `(B, C, 1)`."""
    return [output.unsqueeze(2) if output.dim() == 2 else output for output in tensors_of(deep(volumes))]
