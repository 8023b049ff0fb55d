"""Config keys: text that must not be executed, and keys that are younger than stored results."""

import re
import unicodedata
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any

from medi3d.errors import ConfigError

EXECUTED = ("$", "@", "%")
"""MONAI's bundles execute or resolve text that begins so."""


def check_inert(key: str, value: Any) -> None:
    """Refuse text that another program would execute, resolve or obey, in a value or within it.

    Raises:
        ConfigError: text begins with $, @ or %, holds ${, or holds control characters; names its key.
    """
    if isinstance(value, dict):
        for name, one in value.items():
            check_inert(key, name)
            check_inert(f"{key}.{name}", one)
    elif isinstance(value, list | tuple):
        for one in value:
            check_inert(key, one)
    elif isinstance(value, str):
        bad = value.lstrip().startswith(EXECUTED) or "${" in value
        if bad or any(unicodedata.category(letter) == "Cc" for letter in value):
            raise ConfigError(
                f"{key} is {value!r}: text must not begin with $, @ or %, nor hold ${{ or control characters"
            )


def check_name(key: str, name: str) -> None:
    """Refuse a name that is not safe as the name of a folder.

    Raises:
        ConfigError: it has other characters than letters, digits, dot, dash and underscore, or begins with a
            dot or a dash.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(
            f"{key} is {name!r}: letters, digits, dot, dash and underscore only, no dot or dash first"
        )


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
