"""Errors that a user can cause. Each message says what was wrong, the value, and what would be right.

The command line prints the message of a `Medi3dError` as one line and exits with code 1;
any other exception is a defect of medi3d.
"""


class Medi3dError(Exception):
    """An expected error: the user's input or environment, not a defect of the program."""


class ShapeError(Medi3dError):
    """A tensor, kernel or image has a shape that does not fit."""


class PlanError(Medi3dError):
    """A kernel plan is malformed or names a layer that the network does not have."""


class InexactError(Medi3dError):
    """An inflated network does not equal its 2D source on a boring volume."""


class SourceError(Medi3dError):
    """A network source is unknown or cannot be used as an encoder."""


class WeightsError(Medi3dError):
    """A weights file is missing, unsafe, damaged, or does not fit the network."""


class DataError(Medi3dError):
    """An image, label, clip or cohort is missing, damaged or inconsistent."""


class ConfigError(Medi3dError):
    """A config has an unknown key, a wrong type or contradictory values."""


class TrainingError(Medi3dError):
    """Training cannot continue: loss or weights are no longer finite."""


class Interrupted(Medi3dError):
    """A signal asked the program to stop, and what was in progress has been saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class ResourceError(Medi3dError):
    """The machine has too little memory for what was asked."""


def printable(text: str) -> str:
    """Text that obeys nothing on a terminal: control characters and bytes that are no text as escapes."""
    return "".join(
        letter
        if letter.isprintable() or letter == "\n"
        else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in text
    )


def first_line(error: object, limit: int = 200) -> str:
    """The first line of an error's message, at most `limit` characters; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
