"""2D sources by name: what can be inflated without bringing a network of one's own."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from medi3d import torchvision_shim
from medi3d.errors import SourceError
from medi3d.models.inception import DEFAULT_END_POINTS, InceptionV1

torchvision_shim.install()
import timm  # noqa: E402 - timm needs the shim


@dataclass(frozen=True)
class Source:
    """A 2D network that medi3d builds itself. `build(levels)` gives its feature maps, fine to coarse."""

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
    """Every name that `create_encoder` and `medi3d inflate` take."""
    return [*_SOURCES, *(f"timm:{name}" for name in timm.list_models())]


def build_source(source: str, *, levels: int | None = None, pretrained: bool = False) -> nn.Module:
    """The 2D network of that name, returning a list of feature maps `(N, C, H, W)`, fine to coarse.

    Args:
        source: `timm:NAME`, or a name of medi3d's own (`inception_v1`).
        levels: use only the first so many maps and build no deeper; None: all.
        pretrained: timm's own weights, downloaded by timm.

    Raises:
        SourceError: unknown name (near ones are listed), or timm has no feature maps for it.
    """
    if source in _SOURCES:
        return _SOURCES[source].build(levels)
    family, _, name = source.partition(":")
    if family == "timm" and name:
        return _build_timm(name, levels, pretrained)
    near = get_close_matches(source, list_sources(), n=5, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise SourceError(f"unknown source {source!r}: use timm:NAME or {', '.join(_SOURCES)}{hint}")


def _build_timm(name: str, levels: int | None, pretrained: bool) -> nn.Module:
    if name.split(".")[0] not in timm.list_models():
        near = get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise SourceError(f"timm has no model {name!r}; near: {', '.join(near) or 'none'}")
    wanted: dict[str, Any] = {} if levels is None else {"out_indices": tuple(range(levels))}
    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained, **wanted)
    except Exception as error:  # timm raises many kinds: no features, no weights, no network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"timm cannot build {name!r} as an encoder: {reason}") from error


@register_source("inception_v1", "Inception-V1 with batch norm; under the video plan it is I3D")
def _inception(levels: int | None) -> nn.Module:
    return InceptionV1(DEFAULT_END_POINTS[:levels])


@register_source("inception_v1_fine", "Inception-V1 with stem stride 1, for small volumes; same weights")
def _inception_fine(levels: int | None) -> nn.Module:
    return InceptionV1(DEFAULT_END_POINTS[:levels], stem_stride=1)
