"""2D sources by name: networks that can be inflated without writing one."""

import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

from monai.networks import nets
from torch import nn

from medi3d import torchvision_shim
from medi3d.errors import SourceError
from medi3d.models.inception import DEFAULT_END_POINTS, InceptionV1
from medi3d.models.nnunet import NnUNetEncoder
from medi3d.models.pyramid import extract_pyramid
from medi3d.models.timm_networks import build_timm
from medi3d.models.volumetric import VOLUMETRIC

torchvision_shim.install()
import timm  # noqa: E402 - timm needs the shim
import torchvision  # noqa: E402


@dataclass(frozen=True)
class Source:
    """A 2D network that medi3d builds itself. `build(levels)` returns its feature maps, fine to coarse."""

    name: str
    build: Callable[[int | None], nn.Module]
    description: str


_SOURCES: dict[str, Source] = {}


def register_source(name: str, description: str) -> Callable:
    """Decorator: a function `levels -> nn.Module` that builds a 2D network returning a list of maps."""

    def register(build: Callable[[int | None], nn.Module]) -> Callable[[int | None], nn.Module]:
        _SOURCES[name] = Source(name, build, description)
        return build

    return register


def list_sources() -> list[str]:
    """Every name that `create_encoder` takes; `medi3d inflate` takes those that are not 3D already."""
    return [
        *_SOURCES,
        *VOLUMETRIC,
        *(f"{family}:{name}" for family, known in _LIBRARIES.items() for name in known.names()),
    ]


def build_source(
    source: str, *, levels: int | None = None, pretrained: bool = False, size: int | None = None
) -> nn.Module:
    """The 2D network of that name, returning a list of feature maps `(N, C, H, W)`, fine to coarse.

    Args:
        source: `timm:NAME`, `torchvision:NAME`, `monai:NAME`, or a name of medi3d's own (`inception_v1`).
        levels: number of maps to use, from the finest; deeper layers are not built; None: all.
        pretrained: timm's own weights, downloaded by timm.
        size: height and width of the images in pixels, for networks of timm that take a single size; None:
            their own. It is rounded up to a size that the network supports; other networks ignore it.

    Raises:
        SourceError: unknown name (similar ones are listed), or its library has no feature maps for it.
    """
    if source in VOLUMETRIC:
        raise SourceError(f"{source} is 3D from the start: there is nothing to inflate")
    family, _, name = source.partition(":")
    if source in _SOURCES:
        return _SOURCES[source].build(levels)
    if family not in _LIBRARIES or not name:
        near = _near(source, list_sources())
        kinds = [*(f"{known}:NAME" for known in _LIBRARIES), *_SOURCES, *VOLUMETRIC]
        raise SourceError(f"unknown source {source!r}: use {', '.join(kinds)}{near and f'; near: {near}'}")
    library = _LIBRARIES[family]
    if name.split(".")[0] not in library.names():
        near = _near(name, library.names()) or "none"
        raise SourceError(f"{family} has no model {name!r}; near: {near}")
    more = {"size": size} if size is not None and family == "timm" else {}
    return library.build(name, levels, pretrained, **more)


def whole_network(source: str) -> nn.Module | None:
    """The full network whose encoder `build_source` returns; None: not known.

    Published files hold the full network. Its weights here are random.

    Raises:
        SourceError: it cannot be built.
    """
    family, _, name = source.partition(":")
    if source in _SOURCES:
        return _SOURCES[source].build(None)
    if family not in _LIBRARIES:
        return None
    return _LIBRARIES[family].whole(name)


def _near(name: str, known: Iterable[str]) -> str:
    return ", ".join(get_close_matches(name, list(known), n=5, cutoff=0.5))


def _whole_timm(name: str) -> nn.Module:
    try:
        return timm.create_model(name)
    except Exception as error:  # as above
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"timm cannot build {name!r}: {reason}") from error


def _build_torchvision(name: str, levels: int | None, _: bool) -> nn.Module:
    return extract_pyramid(_whole_torchvision(name), levels)


def _whole_torchvision(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GoogLeNet and Inception announce that their initialisation is slow
        return torchvision.models.get_model(name, weights=None)


_MONAI: dict[str, Callable[[], nn.Module]] = {
    **{
        # MONAI's default stem keeps the resolution; the published ResNet, and MONAI's own encoders, halve it.
        name: partial(getattr(nets, name), spatial_dims=2, conv1_t_stride=2, feed_forward=False)
        for name in ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200")
    },
    **{
        name: partial(getattr(nets, name), spatial_dims=2, in_channels=3, out_channels=1)
        for name in ("densenet121", "densenet169", "densenet201", "densenet264")
    },
    **{
        f"efficientnet-b{size}": partial(nets.EfficientNetBN, f"efficientnet-b{size}", pretrained=False)
        for size in range(9)
    },
}


def _build_monai(name: str, levels: int | None, _: bool) -> nn.Module:
    return extract_pyramid(_MONAI[name](), levels)


@dataclass(frozen=True)
class _Library:
    """A library of networks: its names, and how one is built as an encoder."""

    names: Callable[[], Collection[str]]
    build: Callable[..., nn.Module]
    """(name, levels, pretrained), and `size` if it is given."""
    whole: Callable[[str], nn.Module]
    """The network of that name, with its classifier."""


_LIBRARIES = {
    "timm": _Library(timm.list_models, build_timm, _whole_timm),
    "torchvision": _Library(
        lambda: torchvision.models.list_models(torchvision.models), _build_torchvision, _whole_torchvision
    ),
    "monai": _Library(lambda: _MONAI.keys(), _build_monai, lambda name: _MONAI[name]()),
}


def _end_points(levels: int | None) -> tuple[str, ...]:
    if levels is not None and levels > len(DEFAULT_END_POINTS):
        raise SourceError(f"levels is {levels}: Inception-V1 has {len(DEFAULT_END_POINTS)} feature maps")
    return DEFAULT_END_POINTS[:levels]


@register_source("nnunet:plain", "nnU-Net's plain encoder, six stages; nnunet3d:plain is its 3D twin")
def _nnunet_plain(levels: int | None) -> nn.Module:
    return NnUNetEncoder(2, levels=levels)


@register_source("nnunet:residual", "nnU-Net's residual encoder (ResEnc); nnunet3d:residual is its 3D twin")
def _nnunet_residual(levels: int | None) -> nn.Module:
    return NnUNetEncoder(2, residual=True, levels=levels)


@register_source("inception_v1", "Inception-V1 with batch norm; under the video plan it is I3D")
def _inception(levels: int | None) -> nn.Module:
    return InceptionV1(_end_points(levels))


@register_source("inception_v1_fine", "Inception-V1 with stem stride 1, for small volumes; same weights")
def _inception_fine(levels: int | None) -> nn.Module:
    return InceptionV1(_end_points(levels), stem_stride=1)
