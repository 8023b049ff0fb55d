"""Every key of a config, and how a test states what one of them changes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import torch


def keys_of(section: type) -> Iterator[str]:
    """`Class.field` of a settings class and of all settings inside it, but for the sections themselves."""
    hints = get_type_hints(section)
    for entry in fields(section):
        inside = [kind for kind in _kinds(hints[entry.name]) if is_dataclass(kind)]
        if not inside or inside[0] is not hints[entry.name]:
            yield f"{section.__name__}.{entry.name}"
        for kind in inside:
            yield from keys_of(kind)


def _kinds(hint: Any) -> Iterator[Any]:
    yield hint
    for argument in get_args(hint):
        yield from _kinds(argument)


def changed_keys(one: Any, other: Any, key: str = "") -> set[str]:
    """Names of the keys in which two settings differ."""
    if is_dataclass(one) and type(one) is type(other):
        names = [entry.name for entry in fields(one)]
        return set().union(*(changed_keys(getattr(one, name), getattr(other, name), name) for name in names))
    if isinstance(one, dict) and set(one) == set(other):
        one, other = list(one.values()), [other[name] for name in one]
    if isinstance(one, list) and one and is_dataclass(one[0]) and len(one) == len(other):
        return set().union(*(changed_keys(*pair, key) for pair in zip(one, other, strict=True)))
    return {key} if one != other else set()


@dataclass(frozen=True)
class Change:
    """What shows that a key counts.

    Attributes:
        override: key=value, or several, that change this key and no other.
        look: settings -> something that must differ from what it is without `override`.
        base: overrides that hold with and without it.
        task: whose config is changed.
    """

    override: str
    look: Callable[[Any], Any]
    base: Iterable[str] = ()
    task: str = "segmentation"


def facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Numbers that differ for tensors that differ, in shape, in values or in their order."""
    flat = tensor.detach().double().flatten()
    order = torch.linspace(1, 2, len(flat), dtype=torch.float64)
    return tuple(tensor.shape), float(flat.sum()), float(flat @ flat), float(flat @ order)
