"""The proof: on a boring volume the 3D network equals the 2D network, everywhere.

Both networks run in float64 on different images repeated along depth; every level is compared at
every depth position, borders included. No layer may be hidden: parameters that start at zero or one
(norms, layer scales, gates of residual branches) get random values, the same in both networks, and
batch-norm statistics are calibrated to them. The volume is deep enough for two positions at the
deepest level. One more volume, the first image up to its middle and then the second, shows whether
slices mix.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from medi3d.axes import to_pair
from medi3d.errors import ShapeError, SourceError, first_line
from medi3d.inflation.exactness import TOLERANCE, ExactnessReport, LevelReport
from medi3d.inflation.first_difference import first_difference, refuse_if_out_of_memory
from medi3d.inflation.native3d import replicated_depth
from medi3d.inflation.proof_inputs import (
    adapt_stems,
    edge,
    feature_maps,
    folded_network,
    in_double,
    proof_depth,
    proof_images,
    proof_volumes,
    tensors_of,
    unhide,
)
from medi3d.inflation.rules import Rule
from medi3d.inflation.source import baked


@torch.no_grad()
def verify(
    net2d: nn.Module,
    net3d: nn.Module,
    *,
    size: int | tuple[int, int] | None = None,
    depth: int | None = None,
) -> ExactnessReport:
    """Compare `net3d` with `net2d` on boring volumes, in float64, with nothing left at zero.

    Both are copied and not changed. Parameters with the same name correspond; `net3d` may be made
    by `inflate` or by hand. If it takes another number of channels than `net2d`, images are grey.

    Args:
        net2d: takes `(N, C, H, W)`.
        net3d: takes `(B, C, D, H, W)` and returns the same structure with a depth axis, or with depth pooled
        away. A natively 3D network is proven with its zero padding along depth replaced by replication;
        the effect of its own padding is in `border_rel_error`.
        size: height and width of the images in pixels, one number if they are equal; default 64.
        depth: slices of the volume; default: enough for two positions at the deepest level.

    Raises:
        ShapeError: the networks return different numbers of levels.
        SourceError: `net2d` cannot run in float64.
        ResourceError: the volumes of the proof do not fit into memory.
    """
    started = time.perf_counter()
    report = _compare_networks(baked(net2d), net3d, to_pair(size or 64, "size"), depth)
    report.seconds = time.perf_counter() - started
    return report


def _compare_networks(
    net2d: nn.Module, net3d: nn.Module, size: tuple[int, int], depth: int | None
) -> ExactnessReport:
    flat, deep = in_double(net2d).eval(), in_double(net3d).eval()
    if getattr(deep, "normaliser", None) is not None:  # the 2D network gets its output
        deep.in_channels, deep.normaliser = deep.normaliser.channels, None  # type: ignore[union-attr,assignment]
    adapt_stems(flat, deep, precision=next(net2d.parameters()).dtype)
    generator = torch.Generator().manual_seed(20170522)  # date of the I3D paper
    images = proof_images(flat, deep, size, generator)
    try:
        unhide(flat, deep, images[0], generator)
    except Exception as error:  # the network's own code may raise anything in float64
        refuse_if_out_of_memory(error)
        raise SourceError(
            f"{type(net2d).__name__} cannot run in float64, which the proof needs: {first_line(error)}"
        ) from error

    report = ExactnessReport(size=size[0] if size[0] == size[1] else size)
    clock = time.perf_counter()
    alone = [tensors_of(flat(image)) for image in images[0].split(1)]  # a batch would hide mixing
    answers = [torch.cat(pair) for pair in zip(*alone, strict=True)]
    report.forward_seconds = time.perf_counter() - clock
    with _padding(deep, "replicate") as padded:
        try:
            report.depth = depth or proof_depth(deep, images[1])
            volumes, clock = proof_volumes(images[1], report.depth), time.perf_counter()
            outputs = _in_turn(deep, volumes)
            report.forward_seconds += time.perf_counter() - clock
        except Exception as error:  # the network's own code may raise anything
            refuse_if_out_of_memory(error)
            report.failure = first_difference(flat, deep, images, depth or 64) or first_line(error)
            return report
        if len(outputs) != len(answers):
            raise ShapeError(f"the 2D network returns {len(answers)} levels, the 3D network {len(outputs)}")
        if any(o[:2, :, 0].shape != a.shape for o, a in zip(outputs, answers, strict=True)):
            found = first_difference(flat, deep, images, report.depth)
            report.failure = found or "a level has another shape in 3D"
            return report
    own = feature_maps(deep, proof_volumes(images[1], report.depth)[:2]) if padded else outputs
    for answer, output, with_borders in zip(answers, outputs, own, strict=True):
        report.levels.append(_compare(answer, output, with_borders, size, report.depth))
    report.mixes_depth = any(_mixes(output, report.depth) for output in outputs)
    if report.max_rel_error > TOLERANCE:
        with _padding(deep, "replicate"):
            report.failure = first_difference(flat, deep, images, report.depth)
    report.can_mix_depth = report.mixes_depth or _can_mix(flat, deep, images[1], report.depth, generator)
    return report


def _can_mix(
    flat: nn.Module, deep: nn.Module, images: Tensor, depth: int, generator: torch.Generator
) -> bool:
    """Whether slices mix when the depth parameters of `deep` are random; changes `deep`."""
    shapes = {name: parameter.shape for name, parameter in flat.named_parameters()}
    for name, parameter in folded_network(deep).named_parameters():
        if shapes.get(name) != parameter.shape:
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return any(_mixes(output, depth) for output in _in_turn(deep, proof_volumes(images, depth)))


def _in_turn(deep: nn.Module, volumes: Tensor) -> list[Tensor]:
    """Outputs for both boring volumes in one batch, then for the third, which takes a third less memory."""
    boring, changing = feature_maps(deep, volumes[:2]), feature_maps(deep, volumes[2:])
    return [torch.cat(pair) for pair in zip(boring, changing, strict=True)]


def _compare(
    answer: Tensor, output: Tensor, padded: Tensor, size: tuple[int, int], depth: int
) -> LevelReport:
    expected = answer.unsqueeze(2)
    scale = expected.abs().amax().clamp_min(1e-300)
    error = (output[:2] - expected).abs().amax() / scale
    ends = padded[:2, :, [0, -1]]
    border = (ends - expected).abs().amax() / scale
    worst = float(error) if torch.isfinite(error) else float("inf")
    stride = (
        round(depth / output.shape[2]),
        *(round(n / s) for n, s in zip(size, answer.shape[2:], strict=False)),
    )
    return LevelReport(answer.shape[1], stride, worst, float(border))


def _mixes(output: Tensor, depth: int) -> bool:
    """Whether positions with all their slices on one side of the edge depend on the other side."""
    positions = output.shape[2]
    ends = [(p * depth / positions, (p + 1) * depth / positions) for p in range(positions)]
    before = [p for p, (_, end) in enumerate(ends) if end <= edge(depth)]
    after = [p for p, (start, _) in enumerate(ends) if start >= edge(depth)]
    apart = 1e-12 * output[:2].abs().amax()
    if not before and not after:  # one position for the whole volume: it mixes if it equals neither image's
        return all(bool(((output[2] - output[own]).abs() > apart).any()) for own in (0, 1))
    felt = [(output[2, :, side] - output[own, :, side]).abs() for own, side in ((0, before), (1, after))]
    return any(bool((difference > apart).any()) for difference in felt)


@contextmanager
def _padding(network: nn.Module, mode: str) -> Iterator[bool]:
    """While active, pad depth by replication, except in `valid` layers; yields whether any pads zeros."""
    rules = [r for r in network.modules() if isinstance(r, Rule) and r.depth.padding == "zeros"]
    for rule in rules:
        rule.depth = replace(rule.depth, padding=mode)  # type: ignore[arg-type]
    try:
        with replicated_depth(network) as foreign:
            yield bool(rules) or foreign
    finally:
        for rule in rules:
            rule.depth = replace(rule.depth, padding="zeros")
