"""3D encoders: source + weights + plan -> x (B, C, D, H, W) -> list of feature maps."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock
from torch import Tensor, nn

from medi3d.axes import Triple, check_volume, to_pair
from medi3d.errors import SourceError
from medi3d.inflation.image_sizes import find_sizes, proof_size
from medi3d.inflation.network import Inflated, build, describe, inflate
from medi3d.inflation.plan import KernelPlan
from medi3d.inflation.rules import ConvRule
from medi3d.inflation.source import baked
from medi3d.inflation.tracing import copy_of
from medi3d.models.artifact import load_artifact
from medi3d.models.contract import Normaliser, contract_of, timm_licence
from medi3d.models.sources import build_source, whole_network
from medi3d.models.timm_networks import resized
from medi3d.models.volumetric import VOLUMETRIC, create_volumetric
from medi3d.weights.catalogue import find_weights, get_row, split_part
from medi3d.weights.load import LoadReport, load_weights
from medi3d.weights.rows import WeightsRow

log = logging.getLogger("medi3d")

LEAN_UNET = "unet"
"""Source of the lean 3D U-Net, the baseline of every comparison; it has no 2D origin."""


def create_encoder(
    source: str | nn.Module,
    *,
    weights: str | None = None,
    plan: KernelPlan | str = "isotropic",
    in_channels: int = 1,
    profile: str = "mean",
    levels: int | None = None,
    contract: bool | Mapping[str, Any] = True,
    read_weights: bool = True,
    allow_inexact: bool = False,
    proof: bool = True,
    edit: Callable[[nn.Module], None] | None = None,
    size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """A 3D encoder: `(B, C, D, H, W)` -> list of feature maps; has `.out_channels` and `.strides`.

    2D weights are loaded before inflation, 3D weights after it. Without weights the 3D kernels are redrawn,
    so that a network "from scratch" does not start constant along depth.

    Args:
        source: `timm:NAME`, `torchvision:NAME`, `monai:NAME`, `inception_v1`; `medicalnet:NAME`,
            `unet3d`, `unet`, which are natively 3D; the path of an artifact (which has its own plan, profile
            and weights: others are refused); or a 2D network that returns a list of maps and keeps its
            weights.
        weights: a catalogue row, `timm` (timm's own), `file:PATH` or `file:PATH#PART` (one of several sets
            of weights in a file), `hf:ORG/NAME[@REVISION][/FILE]`, or None.
        plan: kernels along depth.
        in_channels: channels of the volumes.
        profile: depth profile, see `medi3d.inflation.kernels`.
        levels: number of maps to use, from the finest; None: all.
        contract: map data in [-1, 1] to what the weights expect (`medi3d.models.contract`); False leaves that
            to you; the output of `Normaliser.to_dict` is used in place of the weights' own.
        read_weights: False builds the network for these weights, but leaves them unread.
        allow_inexact: return a network even if its proof failed, with the report.
        proof: False skips the proof, for a network and a plan that are proven elsewhere.
        edit: changes the 2D network in place, after 2D weights are read and before it is inflated.
        size: height and width of the volumes in voxels, for transformers that take a single image size and
            are built for it; their weights are resampled to it. None: their own size. Smaller volumes are
            padded inside the encoder, larger ones refused. Networks that take any size ignore it. For your
            own network with images that are not square, give (height, width).

    Raises:
        SourceError, WeightsError, PlanError, InexactError: see `inflate` and `load_weights`.
    """
    if levels is not None and levels < 1:
        raise SourceError(f"an encoder needs at least 1 level, not {levels}")
    if source == LEAN_UNET:
        if weights is not None:
            raise SourceError(f"the lean U-Net has no pretrained weights, but {weights!r} was requested")
        return PlainEncoder(in_channels, PLAIN_CHANNELS[:levels])
    if isinstance(source, str) and source.endswith(".safetensors"):
        return _load_encoder(source, weights, plan, profile, in_channels, levels)
    if isinstance(source, str) and source in VOLUMETRIC:
        return create_volumetric(
            source,
            weights=weights,
            in_channels=in_channels,
            levels=levels,
            contract=bool(contract),
            read_weights=read_weights,
        )
    square = size if isinstance(size, int) else None
    net2d = _source_network(source, weights, levels, read_weights, square if weights is None else None)
    known = contract if isinstance(contract, Mapping) else None
    row = None if known and not read_weights else _row(weights, read_weights)
    if row is not None and read_weights:
        find_weights(row)  # fail now if it is missing: 3D weights are read after the proof
    report: LoadReport | None = None
    if row is not None and row.dimensions == 2 and read_weights:
        report = load_weights(net2d, row, whole=_whole(source), keep_stem=True)
    expected, note = contract_of(source, weights, row) if contract and not known else (None, "")
    normaliser = Normaliser(expected, in_channels) if expected else None
    if known:
        normaliser = Normaliser.from_dict(known, in_channels)
    inside = in_channels if normaliser is None else normaliser.channels
    net2d, built_for = _at_size(net2d, source, weights, levels, square)
    if edit is not None:
        edit(net2d)
    sizes = find_sizes(net2d) if size == square else None
    side = proof_size(net2d, sizes, square) if size == square else size
    if proof:
        encoder = inflate(
            net2d, plan, profile=profile, in_channels=inside, allow_inexact=allow_inexact, size=side
        )
    else:
        plan = plan if isinstance(plan, KernelPlan) else KernelPlan.named(plan)
        encoder, _ = build(net2d, plan, profile=profile, in_channels=inside, size=side)
        describe(encoder)
    encoder.built_for = built_for
    encoder.fit_to(sizes)
    encoder.in_channels, encoder.normaliser = in_channels, normaliser
    if row is not None and row.dimensions == 3 and read_weights:
        report = load_weights(encoder, row, whole=_whole(source))
    if isinstance(source, nn.Module) and proof:
        _check_maps(encoder, source)
    elif weights is None and not isinstance(source, nn.Module):
        draw_kernels(encoder)
    encoder.report.source = source if isinstance(source, str) else type(source).__name__
    if report is not None and row is not None and row.dimensions == 2:
        _tell_inflated(report, net2d, encoder.network)
    encoder.report.weights = _facts(source, weights, row, report)
    if note:
        log.warning(note)
        encoder.report.weights.setdefault("notes", []).append(note)
    if normaliser is not None:
        encoder.report.weights["contract"] = normaliser.to_dict()
    return encoder


def _row(weights: str | None, read_weights: bool) -> WeightsRow | None:
    """The row of the weights; None for timm's own, and for a file that may be missing."""
    if weights in (None, "timm"):
        return None
    path = split_part(str(weights).removeprefix("file:"))[0]
    # The only files that can state what input their weights expect are .safetensors, which may be artifacts.
    optional = str(weights).startswith("file:") and not path.endswith(".safetensors")
    if not read_weights and optional and not Path(path).is_file():
        return None
    return get_row(str(weights))


def _whole(source: str | nn.Module) -> Callable[[], nn.Module | None]:
    """Builds the full network whose first part is the encoder of that name."""
    return lambda: whole_network(source) if isinstance(source, str) else None


def _facts(
    source: str | nn.Module, weights: str | None, row: WeightsRow | None, report: LoadReport | None
) -> dict[str, Any]:
    """The description of the weights in reports and artifacts."""
    if report is not None:
        return {"name": report.weights, **report.to_dict()}
    if weights == "timm":
        return {"name": "timm", "licences": [f"{source}: {timm_licence(str(source))}"]}
    return {"name": weights or "none", "licences": list(row.licences) if row is not None else []}


def _source_network(
    source: str | nn.Module, weights: str | None, levels: int | None, read_weights: bool, size: int | None
) -> nn.Module:
    """The 2D network to inflate, the caller's own as a copy; refuse options that do not apply to it."""
    if isinstance(source, nn.Module):
        if levels is not None or weights == "timm":
            option = "levels" if levels is not None else "weights='timm'"
            raise SourceError(f"{option} belongs to a source by name; {type(source).__name__} is a network")
        return copy_of(baked(source))
    if weights == "timm" and not source.startswith("timm:"):
        raise SourceError(f"weights 'timm' are for sources timm:NAME; {source!r} is not one")
    return build_source(source, levels=levels, pretrained=weights == "timm" and read_weights, size=size)


def _at_size(
    net2d: nn.Module, source: str | nn.Module, weights: str | None, levels: int | None, size: int | None
) -> tuple[nn.Module, int | None]:
    """The network for that size, with its weights, and the size for which it was built, if not its own."""
    if size is None or not isinstance(source, str) or not source.startswith("timm:"):
        return net2d, None
    if weights is None:  # built for it from the start
        return net2d, size
    other = resized(net2d, source.removeprefix("timm:"), levels, size)
    return other, None if other is net2d else size


@torch.no_grad()
def _check_maps(encoder: Inflated, source: nn.Module) -> None:
    """Refuse a network of the caller that returns anything but a list of feature maps."""
    size, training = encoder.report.exactness.size, encoder.training
    kernel = next(encoder.parameters())
    maps = encoder.eval()(kernel.new_zeros(1, encoder.in_channels, 1, *to_pair(size)))
    encoder.train(training)
    if not isinstance(maps, list) or any(not isinstance(x, Tensor) or x.dim() != 5 for x in maps):
        raise SourceError(
            f"{type(source).__name__} is not an encoder: it must return a list of feature maps (N, C, H, W), "
            "as timm's networks do with features_only=True"
        )


def _load_encoder(
    path: str,
    weights: str | None,
    plan: KernelPlan | str,
    profile: str,
    in_channels: int,
    levels: int | None,
) -> nn.Module:
    encoder = load_artifact(path)
    wanted = plan if isinstance(plan, KernelPlan) else KernelPlan.named(plan)
    if wanted not in (encoder.plan, KernelPlan.isotropic()):  # isotropic is the default, not a request
        raise SourceError(
            f"the artifact {path} has the plan {encoder.plan.name!r}, not {wanted.name!r}; inflate its source"
        )
    if profile not in (encoder.profile, "mean"):
        raise SourceError(f"the artifact {path} has the profile {encoder.profile!r}, not {profile!r}")
    if levels not in (None, len(encoder.levels)):
        raise SourceError(f"the artifact {path} has {len(encoder.levels)} levels, not {levels}")
    if weights is not None:
        raise SourceError(f"the artifact {path} has its own weights; leave out {weights!r}")
    if encoder.in_channels != in_channels:
        raise SourceError(f"the artifact {path} takes {encoder.in_channels} channels, not {in_channels}")
    return encoder


def _tell_inflated(report: LoadReport, net2d: nn.Module, network: nn.Module) -> None:
    """Update the report of 2D weights, loaded before inflation, with what inflation did to them."""
    before, after = net2d.state_dict(), network.state_dict()
    for name in [name for name in report.matched if name in before and name in after]:
        flat, deep = before[name].shape, after[name].shape
        if len(deep) == 5 and deep[1] != flat[1]:
            kind = report.adapted
        elif len(deep) == 5 and deep[2] > 1:
            kind = report.inflated
        else:
            continue
        report.matched.remove(name)
        kind.append(name)


def draw_kernels(encoder: Inflated) -> None:
    """Redraw every kernel with depth, independent in each tap, with the variance that preserves activations.

    Where the 2D kernel has variance v, N independent taps need v/N each.
    """
    for rule in encoder.rules().values():
        taps = rule.weight.shape[2] if isinstance(rule, ConvRule) else 1
        if isinstance(rule, ConvRule) and taps > 1:
            # Std over all taps: the 2D one divided by N; unchanged; or, with one of N taps filled, divided by
            # √N.
            times = {"mean": taps, "repeat": 1}.get(rule.profile, taps**0.5)
            spread = float(rule.weight.detach().std()) * times if rule.weight.numel() > taps else 1.0
            nn.init.normal_(rule.weight, std=spread / taps**0.5)


PLAIN_CHANNELS = (32, 64, 128)
"""Channels of the lean U-Net's encoder, fine to coarse."""


class PlainEncoder(nn.Module):
    """The lean U-Net's encoder: one block of two 3×3×3 convolutions per level, each halving the size."""

    def __init__(self, in_channels: int, channels: Sequence[int] = PLAIN_CHANNELS) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = list(channels)
        self.strides: list[Triple] = [(2**i, 2**i, 2**i) for i in range(1, len(channels) + 1)]
        self.blocks = nn.ModuleList(
            UnetBasicBlock(3, before, after, 3, stride=2, norm_name=("instance", {"affine": True}))
            for before, after in zip([in_channels, *channels[:-1]], channels, strict=True)
        )

    def forward(self, volume: Tensor) -> list[Tensor]:
        """`(B, C, D, H, W)` -> maps at strides 2, 4, 8.

        Raises:
            ShapeError: the input is not 5-D, is empty, or has another number of channels.
        """
        check_volume(volume.shape, self.in_channels)
        maps = []
        for block in self.blocks:
            volume = block(volume)
            maps.append(volume)
        return maps
