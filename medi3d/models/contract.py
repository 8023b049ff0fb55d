"""What pretrained weights expect of their input, applied inside the network.

Weights were trained on `(pixel − mean) / std` for pixels in [0, 1]; medi3d's data lies in [−1, 1].
The `Normaliser` comes before the encoder and maps the data's range to the weights', `x · a + b`. It stays
outside the first convolution: that one pads with zeros *after* normalisation, so a shift folded into
its bias would be wrong along every border.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.errors import ShapeError
from medi3d.weights.rows import InputContract, WeightsRow

torchvision_shim.install()
from timm.models import get_pretrained_cfg  # noqa: E402 - timm needs the shim

DATA_RANGE = (-1.0, 1.0)
"""Lowest and highest value of the volumes and clips that medi3d's datasets return."""

MARGIN = 0.5
"""Fraction of the range by which data may exceed it without a warning: augmentation may do so."""


class InputRangeWarning(UserWarning):
    """The input has values far outside the range that the weights were adapted to."""


class Normaliser(nn.Module):
    """Map the data's range to what the weights expect: `(B, C, D, H, W)` -> `(B, channels, D, H, W)`.

    Always exact, for any number of input channels. Where mean and std are the same for all channels,
    one factor and one shift serve any number of channels. Where they differ, as ImageNet's do, data
    with as many channels as the weights is matched in their order. Otherwise each channel is treated as a
    grey image and repeated in each of the weights' channels, so `channels` is 3 per channel of the data. That
    triples the cost of the first convolution alone.

    Args:
        contract: what the weights expect.
        in_channels: channels of the data.
        data_range: lowest and highest value of the data: black and white.

    Raises:
        ShapeError: fewer than one channel, or an empty range.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, contract: InputContract, in_channels: int, data_range: tuple[float, float] = DATA_RANGE
    ) -> None:
        super().__init__()
        low, high = data_range
        if in_channels < 1 or not low < high:
            raise ShapeError(f"{in_channels} channels of the range {data_range} cannot be normalised")
        self.contract, self.in_channels, self.data_range = contract, in_channels, (low, high)
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (contract.mean, contract.std))
        if len(mean) != in_channels and bool((mean == mean[0]).all() and (std == std[0]).all()):
            mean, std = mean[:1].expand(in_channels), std[:1].expand(in_channels)
        self.copies = 1 if len(mean) == in_channels else len(mean)
        turns = in_channels if self.copies > 1 else 1
        scale = 1 / ((high - low) * std)
        shift = (-low / (high - low) - mean) / std
        self.identity = bool((scale == 1).all() and (shift == 0).all())
        self.register_buffer("scale", scale.repeat(turns).view(1, -1, 1, 1, 1).float(), persistent=False)
        self.register_buffer("shift", shift.repeat(turns).view(1, -1, 1, 1, 1).float(), persistent=False)
        self.seen, self.warned = 0, False

    @property
    def channels(self) -> int:
        """Input channels of the network that follows."""
        return self.in_channels * self.copies

    def forward(self, volume: Tensor) -> Tensor:
        """`(B, in_channels, D, H, W)` -> `(B, channels, D, H, W)`; warns once about a wrong range."""
        self._watch(volume)
        if self.identity:
            return volume
        grey = volume.repeat_interleave(self.copies, dim=1) if self.copies > 1 else volume
        return torch.addcmul(self.shift.to(grey), grey, self.scale.to(grey))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for an artifact's metadata."""
        contract = self.contract
        return {
            "mean": list(contract.mean),
            "std": list(contract.std),
            "channels": contract.channels,
            "size": contract.size,
            "data_range": list(self.data_range),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], in_channels: int) -> "Normaliser":
        """Rebuild from `to_dict`'s output."""
        mean, std = tuple(content["mean"]), tuple(content["std"])
        contract = InputContract(mean, std, content["channels"], content["size"])
        low, high = content["data_range"]
        return cls(contract, in_channels, (low, high))

    def extra_repr(self) -> str:
        """Ranges and channels, for `print(network)`."""
        contract = self.contract
        return f"{self.data_range} -> mean={contract.mean}, std={contract.std}, {self.channels} channels"

    @torch.no_grad()
    def _watch(self, volume: Tensor) -> None:
        """Check the 1st, 2nd, 4th, 8th ... input: often enough to notice, too seldom to cost time."""
        if self.warned or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        self.seen += 1
        if self.seen & (self.seen - 1):
            return
        (low, high), (least, most) = self.data_range, (float(v) for v in torch.aminmax(volume))
        slack = MARGIN * (high - low)
        if least < low - slack or most > high + slack:
            self.warned = True
            warnings.warn(
                f"the network's weights are adapted to inputs in [{low:g}, {high:g}], but this one is in "
                f"[{least:.4g}, {most:.4g}]: normalise the data, or pass contract=False and scale it as the "
                "weights expect",
                InputRangeWarning,
                stacklevel=2,
            )


def normaliser_of(weights: WeightsRow | str | None, in_channels: int) -> Normaliser | None:
    """The normaliser for the weights of a row, or for timm's own with `timm:NAME`.

    None without weights, or if they do not state what they expect.
    """
    contract = timm_contract(weights) if isinstance(weights, str) else weights.contract if weights else None
    return Normaliser(contract, in_channels) if contract else None


RGB = 3


def contract_of(
    source: str | nn.Module, weights: str | None, row: WeightsRow | None
) -> tuple[InputContract | None, str]:
    """The input contract of weights for a source, and a note where the weights do not state it.

    A file for a network of timm is assumed to have the contract of timm's own weights, if its first kernel is
    for RGB.

    Args:
        source: the network's name, or a network of the caller.
        weights: as `create_encoder` takes them.
        row: the row of the weights; None for timm's own weights and for a file that is missing.
    """
    if weights is None:
        return None, ""
    if row is not None and row.contract is not None:
        return row.contract, ""
    by_timm = str(source).startswith("timm:") and (row is None or row.source == "any")
    if by_timm and (row is None or row.channels in (None, RGB)):
        contract = timm_contract(str(source))
        if contract is not None:
            told = "" if weights == "timm" else _told_by_timm(contract, str(source))
            return contract, told
    known = f" ({row.note})" if row is not None and row.note else ""
    return None, (
        f"weights {weights} do not say what range, mean and std they expect{known}: the data reaches the "
        "network as it is, so normalise it as in their training"
    )


def _told_by_timm(contract: InputContract, source: str) -> str:
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (contract.mean, contract.std))
    return (
        f"the file does not say what input it expects: taken from timm for {source}, mean {mean}, std {std}"
    )


def timm_contract(source: str) -> InputContract | None:
    """Mean and std of timm's own weights for `timm:NAME`; None where timm does not say."""
    config = get_pretrained_cfg(source.removeprefix("timm:"), allow_unregistered=True)
    if config is None or not config.mean or not config.std:
        return None
    return InputContract(tuple(config.mean), tuple(config.std), "RGB", config.input_size[-1])


def timm_licence(source: str) -> str:
    """The licence of timm's own weights for `timm:NAME`, as timm states it."""
    config = get_pretrained_cfg(source.removeprefix("timm:"), allow_unregistered=True)
    licence = config.license if config is not None else None
    return licence or "see timm's model card"
