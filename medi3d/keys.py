"""Config keys that are younger than stored results, and digests that do not notice them at their defaults."""

from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any

YOUNGER = "younger"


def younger(default: Any) -> Any:
    """A dataclass field that was added after results were stored.

    At its default it means what the code did before, so `stable_dict` leaves it out: a comparison that was
    finished without the key stays finished.

    Args:
        default: the value; a list or dict is copied for each instance.
    """
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={YOUNGER: True})
    return field(default=default, metadata={YOUNGER: True})


def stable_dict(settings: Any) -> Any:
    """Like `dataclasses.asdict`, without the younger keys that are at their defaults."""
    if is_dataclass(settings) and not isinstance(settings, type):
        values = {one: getattr(settings, one.name) for one in fields(settings)}
        return {one.name: stable_dict(v) for one, v in values.items() if not _is_unset(one, v)}
    if isinstance(settings, dict):
        return {key: stable_dict(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [stable_dict(value) for value in settings]
    return settings


def _is_unset(one: Field, value: Any) -> bool:
    default = one.default if one.default_factory is MISSING else one.default_factory()
    return YOUNGER in one.metadata and value == default
