"""End points: layers of a network by name, and their feature maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from medi3d.errors import ShapeError, SourceError
from medi3d.inflation.network import Inflated

NEAR = 8
"""Number of names listed for an unknown end point."""

ANOTHER = "name another layer, or level1, level2, ..."


@dataclass(frozen=True)
class EndPoint:
    """Where features are taken: a module's output, or the map at `level` in an encoder's list of maps."""

    path: str
    level: int | None = None


def end_point(network: nn.Module, name: str) -> EndPoint:
    """The end point of that name: a layer by its path or the end of its path (`Mixed_5c`), or `level1`, ...

    Levels are the encoder's maps, fine to coarse. Of several matching layers the outermost is used.

    Raises:
        SourceError: no layer matches (similar names are listed), or several do at the same depth.
    """
    levels = {f"level{k + 1}": EndPoint(_path_of_encoder(network), k) for k in range(_levels(network))}
    if name in levels:
        return levels[name]
    paths = [path for path, _ in network.named_modules() if path]
    hits = [path for path in paths if path == name or path.endswith(f".{name}")]
    if not hits:
        near = _near(name, paths, list(levels))
        raise SourceError(f"no end point {name!r}; near: {', '.join(near)}")
    outermost = min(path.count(".") for path in hits)
    hits = [path for path in hits if path.count(".") == outermost]
    if len(hits) > 1:
        raise SourceError(f"the end point {name!r} matches {len(hits)} layers: use {' or '.join(hits[:4])}")
    return EndPoint(hits[0])


@torch.inference_mode()
def features_at(network: nn.Module, place: EndPoint, image: Tensor) -> Tensor:
    """Output of `place` for one clip or volume `(1, C, D, H, W)`: `(1, C', D', H', W')`, or vectors.

    Vectors are `(1, C', D')`, or `(1, C')` where depth is gone. For a network that runs on windows of time,
    the windows' outputs are concatenated along D'.

    Raises:
        ShapeError: the layer's output is not a map of the image, or it runs several times.
    """
    given: list[Tensor] = []
    turns: list[None] = []
    layer, owner = network.get_submodule(place.path), _owner(network, place.path)
    fold = owner.fold if isinstance(owner, Inflated) and layer is not owner else None

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        output = output if place.level is None else output[place.level]
        if not isinstance(output, Tensor) or output.dim() not in ((2, 4) if fold else (2, 5)):
            kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(f"{place.path or 'the network'} gives {kind}, not a map; {ANOTHER}")
        maps = fold.unfold(output) if fold else output
        if maps.dim() == 5 and not _is_map_of(image, maps):
            raise ShapeError(
                f"{place.path} gives {tuple(maps.shape)} for {tuple(image.shape)}: height and width are not "
                f"its last axes; {ANOTHER}"
            )
        given.append(maps.clone())  # later layers may change it in place

    hooks = [layer.register_forward_hook(keep)]
    if owner is not None:
        hooks.append(owner.register_forward_hook(lambda *_: turns.append(None)))
    try:
        network(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not given or len(given) > max(1, len(turns)):
        raise ShapeError(f"{place.path} runs {len(given)} times in one forward; {ANOTHER}")
    if len(given) == 1:
        return given[0]
    return torch.cat([maps.unsqueeze(2) if maps.dim() == 2 else maps for maps in given], dim=2)


def _is_map_of(image: Tensor, maps: Tensor) -> bool:
    """Whether height and width are the image's, divided by one stride and rounded."""
    (height, width), (rows, columns) = image.shape[3:], maps.shape[3:]
    return abs(rows * width - columns * height) <= 2 * max(height, width)


def _owner(network: nn.Module, path: str) -> nn.Module | None:
    """The inflated network that a layer is part of, itself included; for other layers the encoder, if any."""
    parts = path.split(".")
    around = [network.get_submodule(".".join(parts[:count])) for count in range(len(parts), -1, -1)]
    inflated = next((module for module in around if isinstance(module, Inflated)), None)
    if inflated is not None:
        return inflated
    encoder = getattr(network, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) and not isinstance(encoder, nn.ModuleList) else None


def _path_of_encoder(network: nn.Module) -> str:
    return "encoder" if hasattr(network, "encoder") else ""


def _levels(network: nn.Module) -> int:
    encoder: Any = getattr(network, "encoder", network)
    channels = getattr(encoder, "out_channels", ())
    is_list = not isinstance(encoder, Inflated) or not hasattr(encoder.network, "Logits")
    return len(channels) if is_list else 0


def _near(name: str, paths: Sequence[str], levels: list[str]) -> list[str]:
    """Names like it; else the levels and the layers at the top of the (inflated) network."""
    last = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    near = get_close_matches(name, [*levels, *last], NEAR, 0.5) or get_close_matches(name, paths, NEAR, 0.5)
    tops = [path.rpartition("network.")[2] for path in paths if "network." in path]
    return near or [*levels, *(top for top in tops if "." not in top)] or list(paths[:NEAR])
