"""From a 2D kernel to a 3D kernel and back: tensors only.

The idea of I3D (Carreira & Zisserman, *Quo Vadis, Action Recognition?*, 2017, sec. 2.4,
arXiv:1705.07750): repeat a k×k kernel N times along the new axis and divide by N,

        ┌───┐            ┌───┐  ┌───┐  ┌───┐
        │ w │    ──►     │w/3│  │w/3│  │w/3│        N = 3 taps along depth
        └───┘            └───┘  └───┘  └───┘

so that a volume made of one slice repeated (a *boring* volume) gives in 3D what the slice gives
in 2D. Any *profile* of taps that sums to one keeps this law; 1/N each is the best known.
"""

from typing import Literal

import torch
from torch import Tensor

from medi3d.errors import PlanError, ShapeError

Exactness = Literal["any", "boring", "never"]
"""The volumes on which a layer with depth equals its 2D layer: any, boring ones only, or none."""

EXACTNESS: tuple[Exactness, ...] = ("never", "boring", "any")
"""From the weakest to the strongest."""

PROFILES: dict[str, Exactness] = {
    "mean": "boring",
    "centre": "any",
    "factorised": "any",
    "repeat": "never",
    "acs": "never",
}
"""How a 2D kernel is spread over depth, and on which volumes that is exact.

mean: 1/N in each tap (I3D). centre: everything in the middle tap. factorised: the 2D kernel as
1×k×k, then a k×1×1 convolution that starts as identity (P3D: Qiu et al. 2017, arXiv:1711.10305;
R(2+1)D: Tran et al. 2018, arXiv:1711.11248). The others are baselines for comparisons. repeat: 1 in
each tap, the known mistake, with outputs N times too large. acs: each third of the output channels has
its 2D kernels in another plane (Yang et al. 2021, arXiv:1911.10477), so most of them never see the
plane that they were trained for.
"""


def depth_profile(taps: int, profile: str = "mean") -> Tensor:
    """Weights of the `taps` depth taps, shape `(taps,)`, float64. They sum to 1 except for `repeat`.

    Raises:
        PlanError: the profile is unknown or is not a vector of weights (`factorised`, `acs`), or `taps` is
            below 1.

    >>> depth_profile(3, "centre")
    tensor([0., 1., 0.], dtype=torch.float64)
    """
    if taps < 1:
        raise PlanError(f"a kernel needs at least 1 tap along depth, not {taps}")
    if profile not in PROFILES:
        raise PlanError(f"unknown depth profile {profile!r}: use one of {', '.join(PROFILES)}")
    if profile == "mean" or taps == 1:
        return torch.full((taps,), 1 / taps, dtype=torch.float64)
    if profile == "repeat":
        return torch.ones(taps, dtype=torch.float64)
    if profile == "centre":
        weights = torch.zeros(taps, dtype=torch.float64)
        weights[(taps - 1) // 2] = 1
        return weights
    raise PlanError(f"profile {profile!r} keeps kernels 2D: it has 1 tap along depth, not {taps}")


def inflate_kernel(weight: Tensor, taps: int, profile: str = "mean") -> Tensor:
    """Spread a 2D kernel over `taps` depth taps: `(O, I, kH, kW)` -> `(O, I, kD, kH, kW)`.

    Raises:
        ShapeError: `weight` is not 4-D.
    """
    if weight.dim() != 4:
        raise ShapeError(f"a 2D kernel has shape (O, I, kH, kW), not {tuple(weight.shape)}")
    shares = depth_profile(taps, profile).tolist()
    if taps == 1:
        return weight.unsqueeze(2).clone()
    exact = weight.double()
    if profile == "mean":
        return torch.stack(_carry_rounding(exact, taps, weight.dtype), dim=2)
    return torch.stack([(exact * share).to(weight.dtype) for share in shares], dim=2)


def _carry_rounding(weight: Tensor, taps: int, dtype: torch.dtype) -> list[Tensor]:
    """Taps that sum to the 2D kernel (float64) to the last bit, although w/N is rounded in each of them.

    The rounding error is a few units in the last place of one tap, so the middle tap can carry it.
    Where that sum crosses a power of two and is rounded again, the first tap takes the rest.
    """
    share = (weight / taps).to(dtype)
    middle = weight.sub(share, alpha=taps - 1).to(dtype)
    first = weight.sub(share, alpha=taps - 2).sub_(middle).to(dtype)
    kernel = [share] * taps
    kernel[taps // 2], kernel[0] = middle, first
    return kernel


def place_in_planes(weight: Tensor) -> Tensor:
    """ACS: lay k×k kernels in a cube, `(O, I, k, k)` -> `(O, I, k, k, k)`, zero outside their planes.

    The first third of the output channels lies in the axial plane (H, W), the second in the coronal
    (D, W), the third in the sagittal one (D, H), each through the middle of the cube; where O does
    not divide by three the first groups are the larger ones, as in the authors' code (ACSConv).

    Raises:
        ShapeError: the kernels are not square.
    """
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ShapeError(
            f"profile acs turns k×k kernels (O, I, k, k) into planes; these are {tuple(weight.shape)}"
        )
    size = weight.shape[2]
    middle = (size - 1) // 2
    before, after = middle, size - 1 - middle
    groups = []
    for plane, group in enumerate(weight.tensor_split(3)):
        padding = [0] * 6  # width, height, depth: pad the axis across the plane
        padding[2 * (2 - plane)], padding[2 * (2 - plane) + 1] = before, after
        groups.append(torch.nn.functional.pad(group.unsqueeze(2 + plane), padding))
    return torch.cat(groups)


def collapse_kernel(weight: Tensor) -> Tensor:
    """The 2D kernel with the same output on boring volumes: the sum over depth taps.

    `(O, I, kD, kH, kW)` -> `(O, I, kH, kW)`. Undoes `inflate_kernel` for every profile that sums to one.
    """
    return weight.sum(dim=2)


def resize_depth(weight: Tensor, taps: int) -> Tensor:
    """Give a 3D kernel another number of depth taps: `(O, I, kD, kH, kW)` -> `(O, I, taps, kH, kW)`.

    The law: the sum over depth is kept, so the output for a volume that is constant along depth is kept.
    The kernel is seen as a bar over its extent. More taps cut the same bar into thinner slices
    (1 -> N is the profile `mean`). Fewer taps are the least-squares inverse (N -> 1 is the
    sum, 3 -> 5 -> 3 returns the kernel). This changes the output for volumes that vary along depth:
    it is for weights whose depth kernel does not fit, by name, and is never done silently.

    Raises:
        ShapeError: `weight` is not 5-D.
        PlanError: fewer than one tap.
    """
    if weight.dim() != 5:
        raise ShapeError(f"a 3D kernel has shape (O, I, kD, kH, kW), not {tuple(weight.shape)}")
    if taps < 1:
        raise PlanError(f"a kernel needs at least 1 tap along depth, not {taps}")
    have = weight.shape[2]
    if taps == have:
        return weight
    matrix = _thinner_slices(have, taps) if taps > have else torch.linalg.pinv(_thinner_slices(taps, have))
    resized = torch.einsum("oidhw,nd->oinhw", weight.double(), matrix.to(weight.device))
    return resized.to(weight.dtype)


def _thinner_slices(have: int, taps: int) -> Tensor:
    """Share of each of `have` slices that falls in each of `taps` slices of the same bar: `(taps, have)`."""
    edges = torch.arange(taps + 1, dtype=torch.float64) * have / taps
    old = torch.arange(have, dtype=torch.float64)
    start = torch.maximum(edges[:-1, None], old)
    end = torch.minimum(edges[1:, None], old + 1)
    return (end - start).clamp_min(0)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Give a first kernel `(O, I, ...)` another number of input channels, `(O, channels, ...)`.

    The law: `channels` copies of one grey image give what I copies of it gave. One channel takes
    the sum over I. With more channels than I, kernels repeat in turn, divided by the number of copies.

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
