"""From a 2D kernel to a 3D kernel and back: tensors only.

The idea of I3D (Carreira & Zisserman, *Quo Vadis, Action Recognition?*, 2017, sec. 2.4,
arXiv:1705.07750): repeat a k×k kernel N times along the new axis and divide by N,

        ┌───┐            ┌───┐  ┌───┐  ┌───┐
        │ w │    ──►     │w/3│  │w/3│  │w/3│        N = 3 taps along depth
        └───┘            └───┘  └───┘  └───┘

so that a volume made of one slice repeated (a *boring* volume) gives in 3D what the slice gives
in 2D. Any *profile* of taps that sums to one keeps this law; 1/N each is only the best known.
"""

import torch
from torch import Tensor

from medi3d.errors import PlanError, ShapeError

PROFILES = ("mean", "centre", "repeat")
"""`mean`: 1/N in each tap (I3D). `centre`: everything in the middle tap, which equals the 2D network
on any volume, not only on boring ones. `repeat`: 1 in each tap, the known mistake (answers N times
too large), kept as a rival for comparisons."""


def depth_profile(taps: int, profile: str = "mean") -> Tensor:
    """Weights of the `taps` depth taps, shape `(taps,)`, float64. They sum to 1 except for `repeat`.

    Raises:
        PlanError: unknown profile, or fewer than one tap.

    >>> depth_profile(3, "centre")
    tensor([0., 1., 0.], dtype=torch.float64)
    """
    if taps < 1:
        raise PlanError(f"a kernel needs at least 1 tap along depth, not {taps}")
    if profile == "mean":
        return torch.full((taps,), 1 / taps, dtype=torch.float64)
    if profile == "repeat":
        return torch.ones(taps, dtype=torch.float64)
    if profile == "centre":
        weights = torch.zeros(taps, dtype=torch.float64)
        weights[(taps - 1) // 2] = 1
        return weights
    raise PlanError(f"unknown depth profile {profile!r}: use one of {', '.join(PROFILES)}")


def inflate_kernel(weight: Tensor, taps: int, profile: str = "mean") -> Tensor:
    """Spread a 2D kernel over `taps` depth taps: `(O, I, kH, kW)` -> `(O, I, kD, kH, kW)`.

    Raises:
        ShapeError: `weight` is not 4-D.
    """
    if weight.dim() != 4:
        raise ShapeError(f"a 2D kernel has shape (O, I, kH, kW), not {tuple(weight.shape)}")
    share = depth_profile(taps, profile).to(weight.device).view(1, 1, taps, 1, 1)
    exact = weight.unsqueeze(2).double() * share
    kernel = exact.to(weight.dtype)
    if profile == "mean" and taps > 1:
        _carry_rounding(kernel, weight)
    return kernel


def _carry_rounding(kernel: Tensor, weight: Tensor) -> None:
    """Let the taps sum to the 2D kernel to the last bit, though w/N is rounded in each of them.

    What rounding lost is a few units in the last place of one tap, so the middle tap can carry it;
    where that crosses a power of two and is rounded again, the first tap takes the rest.
    """
    for tap in (kernel.shape[2] // 2, 0):
        lost = weight.double() - kernel.double().sum(dim=2)
        kernel[:, :, tap] = (kernel[:, :, tap].double() + lost).to(kernel.dtype)


def collapse_kernel(weight: Tensor) -> Tensor:
    """The 2D kernel with the same answer on boring volumes: the sum over depth taps.

    `(O, I, kD, kH, kW)` -> `(O, I, kH, kW)`. Undoes `inflate_kernel` for every profile that sums to one.
    """
    return weight.sum(dim=2)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Give a first kernel `(O, I, ...)` another number of input channels, `(O, channels, ...)`.

    The law: `channels` copies of one grey image give what I copies of it gave. One channel takes
    the sum over I; with more channels than I they are repeated in turn and divided by how often.

    Raises:
        ShapeError: `channels` is below 1.
    """
    if channels < 1:
        raise ShapeError(f"a network needs at least 1 input channel, not {channels}")
    source = weight.shape[1]
    if channels == source:
        return weight
    if channels < source:
        return (weight.sum(dim=1, keepdim=True) / channels).repeat_interleave(channels, dim=1)
    turns = torch.arange(channels, device=weight.device) % source
    share = torch.bincount(turns, minlength=source)[turns].to(weight.dtype)
    return weight[:, turns] / share.view(1, channels, *[1] * (weight.dim() - 2))
