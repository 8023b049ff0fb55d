"""The proof: on a boring volume the 3D network equals the 2D network, everywhere.

Both networks run in float64 on different images repeated along depth; every level is compared at
every depth position, borders included. Nothing may hide: parameters that start at zero or one
(norms, layer scales, gates of residual branches) get random values, the same in both networks, and
batch-norm statistics are calibrated to them; the volume is deep enough that the deepest level still
has two positions. One more volume, which is one image up to its middle and the other from there on,
tells whether slices mix.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from medi3d.errors import ResourceError, ShapeError
from medi3d.inflation.fold import Fold
from medi3d.inflation.foreign import replicated_depth
from medi3d.inflation.kernels import adapt_channels, inflate_kernel
from medi3d.inflation.rules import Rule

TOLERANCE = 1e-9
"""Largest max|3D − 2D| / max|2D| that counts as exact. Rounding in float64 stays far below it."""

DEEPEST = 256
"""Depth of the largest volume that a proof uses by itself, in slices."""


@dataclass(frozen=True)
class LevelReport:
    """One output of the network."""

    channels: int
    stride: tuple[int, ...]
    """Voxels per position as (depth, height, width); (depth,) where the output is a vector."""
    max_rel_error: float
    """Worst over depth positions, depth padded by replication."""
    border_rel_error: float
    """At the first and last depth position, with the padding that the plan itself has."""


@dataclass
class ExactnessReport:
    """How far a 3D network is from its 2D source on boring volumes."""

    levels: list[LevelReport] = field(default_factory=list)
    mixes_depth: bool = False
    """Whether a position depends on slices beside its own, on either side, with these weights.

    Measured by changing a slice; parameters that the 2D network has too are random where they were constant.
    """
    can_mix_depth: bool = False
    """Whether it would with random values in parameters that the 2D network lacks or has in another shape.

    Kernels with all in the middle tap, a k×1×1 convolution that starts as identity and an attention over
    depth that ends at zero mix nothing yet; training lets them.
    """
    size: int = 0
    depth: int = 0
    seconds: float = 0.0
    """What the whole proof took."""
    forward_seconds: float = 0.0
    """What the one forward of the 2D network and the one of the 3D network took of it."""
    failure: str = ""
    """Empty, or the first module that differs and how."""

    @property
    def max_rel_error(self) -> float:
        """Worst over levels and depth positions; infinite if the network could not run."""
        return max((level.max_rel_error for level in self.levels), default=float("inf"))

    @property
    def exact(self) -> bool:
        """Whether the proof holds."""
        return not self.failure and self.max_rel_error <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        levels = [dict(vars(level)) for level in self.levels]
        return {
            "levels": levels,
            "max_rel_error": self.max_rel_error,
            "mixes_depth": self.mixes_depth,
            "can_mix_depth": self.can_mix_depth,
            "proof": {
                "size": self.size,
                "depth": self.depth,
                "seconds": round(self.seconds, 3),
                "forward_seconds": round(self.forward_seconds, 3),
                "tolerance": TOLERANCE,
                "failure": self.failure,
            },
        }


@torch.no_grad()
def verify(
    net2d: nn.Module, net3d: nn.Module, *, size: int | None = None, depth: int | None = None
) -> ExactnessReport:
    """Compare `net3d` with `net2d` on boring volumes, in float64, with nothing left at zero.

    Both are copied and not changed. Parameters of equal name correspond; `net3d` may have been made
    by `inflate` or by hand. Where it takes other channels than `net2d`, images are grey.

    Args:
        net2d: takes `(N, C, H, W)`.
        net3d: takes `(B, C, D, H, W)` and returns the same structure with a depth axis, or with depth pooled
            away. One that is 3D by birth is proven with its zero padding along depth replicated; what its own
            padding does is in `border_rel_error`.
        size: height and width of the images in pixels; 64 if not given.
        depth: slices of the volume; if not given, enough for two positions at the deepest level.

    Raises:
        ShapeError: the networks return different numbers of levels.
        ResourceError: the volumes of the proof do not fit into memory.
    """
    started = time.perf_counter()
    report = _compare_networks(net2d, net3d, size or 64, depth)
    report.seconds = time.perf_counter() - started
    return report


def _compare_networks(net2d: nn.Module, net3d: nn.Module, size: int, depth: int | None) -> ExactnessReport:
    flat, deep = _in_double(net2d).eval(), _in_double(net3d).eval()
    if getattr(deep, "normaliser", None) is not None:  # the 2D network is shown what lies behind it
        deep.in_channels, deep.normaliser = deep.normaliser.channels, None  # type: ignore[union-attr,assignment]
    _adapt_stems(flat, deep, precision=next(net2d.parameters()).dtype)
    generator = torch.Generator().manual_seed(20170522)  # the day of the paper
    images = _images(flat, deep, size, generator)
    _unhide(flat, deep, images[0], generator)

    report = ExactnessReport(size=size)
    clock = time.perf_counter()
    alone = [_tensors(flat(image)) for image in images[0].split(1)]  # a batch would hide that it is mixed
    answers = [torch.cat(pair) for pair in zip(*alone, strict=True)]
    report.forward_seconds = time.perf_counter() - clock
    with _padding(deep, "replicate") as padded:
        try:
            report.depth = depth or _proof_depth(deep, images[1])
            volumes, clock = _volumes(images[1], report.depth), time.perf_counter()
            outputs = _in_turn(deep, volumes)
            report.forward_seconds += time.perf_counter() - clock
        except (RuntimeError, ShapeError, ValueError) as error:
            _refuse_if_out_of_memory(error)
            report.failure = _first_difference(flat, deep, images, depth or 64) or _brief(error)
            return report
        if len(outputs) != len(answers):
            raise ShapeError(f"the 2D network returns {len(answers)} levels, the 3D network {len(outputs)}")
        if any(o[:2, :, 0].shape != a.shape for o, a in zip(outputs, answers, strict=True)):
            found = _first_difference(flat, deep, images, report.depth)
            report.failure = found or "a level has another shape in 3D"
            return report
    own = _maps(deep, _volumes(images[1], report.depth)[:2]) if padded else outputs
    for answer, output, with_borders in zip(answers, outputs, own, strict=True):
        report.levels.append(_compare(answer, output, with_borders, size, report.depth))
    report.mixes_depth = any(_mixes(output, report.depth) for output in outputs)
    if report.max_rel_error > TOLERANCE:
        with _padding(deep, "replicate"):
            report.failure = _first_difference(flat, deep, images, report.depth)
    report.can_mix_depth = report.mixes_depth or _can_mix(flat, deep, images[1], report.depth, generator)
    return report


def _can_mix(
    flat: nn.Module, deep: nn.Module, images: Tensor, depth: int, generator: torch.Generator
) -> bool:
    """Whether slices mix once what `deep` has for depth is random; changes `deep`."""
    shapes = {name: parameter.shape for name, parameter in flat.named_parameters()}
    for name, parameter in _inner(deep).named_parameters():
        if shapes.get(name) != parameter.shape:
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return any(_mixes(output, depth) for output in _in_turn(deep, _volumes(images, depth)))


def _in_double(network: nn.Module) -> nn.Module:
    """A copy in float64, made in one step: a large network is not copied twice."""
    tensors = [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]
    return copy.deepcopy(network, {id(t): _twin(t) for t in tensors})


def _twin(tensor: Tensor) -> Tensor:
    twin = tensor.detach().to(torch.float64, copy=True)
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _adapt_stems(flat: nn.Module, deep: nn.Module, precision: torch.dtype) -> None:
    """Give the 2D network the channels of the 3D one, so that it is compared with its own channel sums.

    Done in the precision of the weights: in float32 a sum over RGB is rounded, once, in both.
    """
    source, target = _first_kernel_channels(flat), _first_kernel_channels(deep)
    twins = dict(_inner(deep).named_parameters())
    for name, parameter in flat.named_parameters():
        twin = twins.get(name)
        if twin is None or (parameter.dim(), twin.dim()) != (4, 5):
            continue
        if (parameter.shape[1], twin.shape[1]) == (source, target) and source != target:
            parameter.data = adapt_channels(parameter.data.to(precision), target).double()


def _images(flat: nn.Module, deep: nn.Module, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two different images for each network; grey where they still take different channels."""
    source, target = _first_kernel_channels(flat), _first_kernel_channels(deep)
    if source != target:  # not adapted: the 2D network regroups its channels before its first convolution
        source = getattr(deep, "image_channels", source)
    channels = source if source == target else 1
    images = torch.randn(2, channels, size, size, dtype=torch.float64, generator=generator)
    return images.expand(2, source, -1, -1).clone(), images.expand(2, target, -1, -1).clone()


def _volumes(images: Tensor, depth: int) -> Tensor:
    """Both images repeated along depth, and a volume that goes from one to the other: `(3, C, D, H, W)`."""
    volumes = images[[0, 1, 0]].unsqueeze(2).repeat(1, 1, depth, 1, 1)
    volumes[2, :, _edge(depth) :] = images[1].unsqueeze(1)
    return volumes


def _in_turn(deep: nn.Module, volumes: Tensor) -> list[Tensor]:
    """Outputs for both boring volumes, in one batch, then for the third: it takes a third less memory."""
    boring, changing = _maps(deep, volumes[:2]), _maps(deep, volumes[2:])
    return [torch.cat(pair) for pair in zip(boring, changing, strict=True)]


def _edge(depth: int) -> int:
    """The first slice of the second image in the changing volume."""
    return depth // 2


def _proof_depth(deep: nn.Module, images: Tensor) -> int:
    """Twice the largest stride along depth, at least 8: as its rules tell, else found on a thin volume."""
    if _inner(deep) is not deep:
        stride = max((level[0] for level in deep.strides), default=1)  # type: ignore[union-attr]
    else:
        probe = 32
        outputs = _maps(deep, images[:1].unsqueeze(2).repeat(1, 1, probe, 1, 1))
        stride = max(-(-probe // max(output.shape[2], 1)) for output in outputs)
    return min(DEEPEST, max(8, 2 * stride))


def _compare(answer: Tensor, output: Tensor, padded: Tensor, size: int, depth: int) -> LevelReport:
    expected = answer.unsqueeze(2)
    scale = expected.abs().amax().clamp_min(1e-300)
    error = (output[:2] - expected).abs().amax() / scale
    ends = padded[:2, :, [0, -1]]
    border = (ends - expected).abs().amax() / scale
    worst = float(error) if torch.isfinite(error) else float("inf")
    stride = (round(depth / output.shape[2]), *(round(size / s) for s in answer.shape[2:]))
    return LevelReport(answer.shape[1], stride, worst, float(border))


def _mixes(output: Tensor, depth: int) -> bool:
    """Whether positions on one side of the edge, whose own slices all lie there, feel the other side."""
    positions = output.shape[2]
    ends = [(p * depth / positions, (p + 1) * depth / positions) for p in range(positions)]
    before = [p for p, (_, end) in enumerate(ends) if end <= _edge(depth)]
    after = [p for p, (start, _) in enumerate(ends) if start >= _edge(depth)]
    apart = 1e-12 * output[:2].abs().amax()
    if not before and not after:  # one position for the whole volume: it mixes if it is neither image's
        return all(bool(((output[2] - output[own]).abs() > apart).any()) for own in (0, 1))
    felt = [(output[2, :, side] - output[own, :, side]).abs() for own, side in ((0, before), (1, after))]
    return any(bool((difference > apart).any()) for difference in felt)


@contextmanager
def _padding(network: nn.Module, mode: str) -> Iterator[bool]:
    """Let depth be padded by replication for a while, not in `valid` layers; gives whether any pads zeros."""
    rules = [r for r in network.modules() if isinstance(r, Rule) and r.depth.padding == "zeros"]
    for rule in rules:
        rule.depth = replace(rule.depth, padding=mode)  # type: ignore[arg-type]
    try:
        with replicated_depth(network) as foreign:
            yield bool(rules) or foreign
    finally:
        for rule in rules:
            rule.depth = replace(rule.depth, padding="zeros")


def _unhide(flat: nn.Module, deep: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Add the same random numbers to corresponding parameters, so that no branch is multiplied by zero.

    Adding, not setting: a parameter that differs between the networks still differs afterwards.
    """
    twins = dict(_inner(deep).named_parameters())
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
            twin.add_(inflate_kernel(change, twin.shape[2]))
    _calibrate(flat, _inner(deep), images)


def _calibrate(flat: nn.Module, deep: nn.Module, images: Tensor) -> None:
    """Move batch-norm statistics to those of the images, by the same step in both networks."""
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


def _first_difference(flat: nn.Module, deep: nn.Module, images: tuple[Tensor, Tensor], depth: int) -> str:
    """The first module, in the order of execution, whose output is not the 2D one."""
    inner = _inner(deep)
    expected: dict[str, Tensor] = {}
    with _recording(flat, expected):
        flat(images[0])
    found: dict[str, Tensor] = {}
    problem = ""
    with _recording(inner, found):
        try:
            deep(_volumes(images[1], depth)[:2])
        except (RuntimeError, ShapeError, ValueError) as error:
            _refuse_if_out_of_memory(error)
            problem = _brief(error)
    batch = 2
    for path, output in found.items():
        reference = expected.get(path)
        if reference is None or reference.shape[0] != batch or output.shape[0] % batch:
            continue
        if inner is not deep:
            slices = output.unflatten(0, (batch, -1))
        else:  # depth of a network that is 3D by birth may be pooled away
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


def _inner(network: nn.Module) -> nn.Module:
    """The folded 2D network inside an inflated one; any other network itself."""
    return network.network if isinstance(getattr(network, "fold", None), Fold) else network  # type: ignore[return-value]


def _first_kernel_channels(network: nn.Module) -> int:
    known = getattr(network, "in_channels", None)
    if _inner(network) is network:  # the weights know better: a stem may have been adapted
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
                return layer.weight.shape[1] * layer.groups
    if isinstance(known, int):
        return known
    raise ShapeError(f"{type(network).__name__} has no convolution, so its input channels are not known")


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in _tensors(value)]


def _maps(deep: nn.Module, volumes: Tensor) -> list[Tensor]:
    """Outputs of a 3D network; where depth is pooled away, `(B, C)` as one position `(B, C, 1)`."""
    return [output.unsqueeze(2) if output.dim() == 2 else output for output in _tensors(deep(volumes))]


def _refuse_if_out_of_memory(error: Exception) -> None:
    """Too little memory says nothing about exactness: never let it look like a difference."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        raise ResourceError(
            f"too little memory for the proof ({_brief(error)}): prove fewer levels, or on a larger machine"
        ) from error


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
