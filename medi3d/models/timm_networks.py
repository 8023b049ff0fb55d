"""Networks of timm as 2D sources, built for the image sizes that they will see."""

import inspect
import sys
from typing import Any

import torch
from torch import nn

from medi3d import torchvision_shim
from medi3d.errors import SourceError, first_line
from medi3d.inflation.image_sizes import takes

torchvision_shim.install()
import timm  # noqa: E402 - timm needs the shim

ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True, "strict_img_size": False}
"""Arguments of transformers that let position embeddings and windows follow the image."""

STEP = 32
"""Images are padded to a multiple of this, in pixels; networks that reject that are built for their size."""

_ROUNDED_TO = (STEP, 64, 128, 1)


def build_timm(name: str, levels: int | None, pretrained: bool, *, size: int | None = None) -> nn.Module:
    """`timm:NAME` as a list of feature maps `(N, C, H, W)`, fine to coarse; see `build_source`."""
    try:
        return _build(name, levels, pretrained, _options(name, size))
    except Exception as error:  # timm raises many kinds: no features, no weights, no network
        raise SourceError(f"timm cannot build {name!r} as an encoder: {first_line(error)}") from error


def resized(net2d: nn.Module, name: str, levels: int | None, size: int) -> nn.Module:
    """The network for another image size, with its weights; unchanged if they cannot be resampled.

    Position embeddings and tables are resampled as timm does for its own weights.
    """
    options = _options(name, size)
    if "img_size" not in options:
        return net2d
    other: Any = _build(name, levels, False, options)
    ours, theirs = net2d.state_dict(), other.state_dict()
    inner: Any = other.model if hasattr(other, "model") else other
    resample = getattr(sys.modules[type(inner).__module__], "checkpoint_filter_fn", None)
    if any(theirs[key].shape != value.shape for key, value in ours.items() if key in theirs) and resample:
        state = {key.removeprefix("model."): value for key, value in ours.items()}
        ours = {f"model.{key}" if inner is not other else key: v for key, v in resample(state, inner).items()}
    try:
        other.load_state_dict(ours)
    except RuntimeError:  # timm has no way to resample the weights of this family
        return net2d
    return other.train(net2d.training)


def _build(name: str, levels: int | None, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    wanted: dict[str, Any] = dict(options)
    if levels is not None:  # the first maps that timm returns: for a transformer its last blocks
        with torch.device("meta"):
            every: Any = timm.create_model(name, features_only=True, **options)
        maps = every.feature_info.out_indices
        if levels > len(maps):
            raise SourceError(f"levels is {levels}, but it has {len(maps)} feature maps")
        wanted["out_indices"] = tuple(maps[:levels])
    net: Any = timm.create_model(name, features_only=True, pretrained=pretrained, **wanted)
    if str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC"):
        # Channels last: timm's other feature extractor permutes them.
        wanted["feature_cls"] = "getter"
        net = timm.create_model(name, features_only=True, pretrained=pretrained, **wanted)
    if hasattr(net, "_stage_out_idx"):  # EfficientNets and MobileNets: timm runs unused blocks
        net.blocks = net.blocks[: max(net._stage_out_idx)]
    if "img_size" in options:
        net.img_size = options["img_size"]  # for `own_sizes`: not every network reports it
    return net


def _options(name: str, size: int | None) -> dict[str, Any]:
    """Options with which timm's network takes any size, or else images of `size` pixels."""
    with torch.device("meta"):
        whole = timm.create_model(name)
    known = _parameters(type(whole))
    options: dict[str, Any] = {key: value for key, value in ANY_SIZE.items() if key in known}
    if size is None or "img_size" not in known or _takes(name, options, size + -size % STEP):
        return options
    for multiple in _ROUNDED_TO:
        side = size + -size % multiple
        if _takes(name, sized := {**options, "img_size": side}, side):
            return sized
    return options


def _parameters(kind: type) -> set[str]:
    """Names of a class's arguments, including those of its bases where it passes them on."""
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            names |= set(parameters)
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    return names


def _takes(name: str, options: dict[str, Any], side: int) -> bool:
    """Whether timm builds the network with these options and it takes images of that size, without data."""
    try:
        with torch.device("meta"):
            net = _build(name, None, False, options)
    except Exception:  # timm asserts the sizes that it wants
        return False
    return takes(net, side)
