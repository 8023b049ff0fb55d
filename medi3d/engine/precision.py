"""Which arithmetic and memory format a device computes fastest in, and how to use them.

bfloat16 and channels-last memory are worth little alone and 2.4 to 3.4 times together (measured on 2 cores
of an AMD EPYC with avx512_bf16: without channels-last, oneDNN reorders every tensor), so they are switched
together.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from medi3d.errors import ConfigError
from medi3d.inflation.rules.convolution import padded_where_short

CHOICES = ("auto", "fp32", "bf16")


def has_fast_bf16(device: torch.device) -> bool:
    """True where the processor (avx512_bf16 or AMX) or the GPU multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _RightGradients(TorchFunctionMode):
    """While active, convolutions whose gradient oneDNN would get wrong are padded by a copy."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv3d and len(args) == 7 and not isinstance(args[4], str):  # as nn.Conv3d calls it
            x, weight, bias, stride, padding, dilation, groups = args
            x, padding = padded_where_short(x, weight, stride, padding, dilation)
            args = (x, weight, bias, stride, padding, dilation, groups)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Precision:
    """How a network computes on `device`: in float32, or in bfloat16 autocast with channels-last memory."""

    device: torch.device
    bf16: bool

    @classmethod
    def choose(cls, choice: str, device: torch.device | str) -> "Precision":
        """From a config's word: "fp32", "bf16", or "auto" for what the device does fastest.

        Raises:
            ConfigError: `choice` is another word.
        """
        device = torch.device(device)
        if choice not in CHOICES:
            raise ConfigError(f"training.precision: {choice!r} is none of {', '.join(CHOICES)}")
        return cls(device, choice == "bf16" or (choice == "auto" and has_fast_bf16(device)))

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context of a forward pass. Losses and metrics belong outside of it, in float32."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16))
            if self.bf16 and self.device.type == "cpu" and torch.is_grad_enabled():
                stack.enter_context(_RightGradients())
            yield

    def place_network(self, network: nn.Module) -> nn.Module:
        """`network` on the device, its 5-D (and 4-D) weights in channels-last memory where that is faster."""
        network.to(self.device)
        if self.bf16:
            for parameter in network.parameters():
                parameter.data = self.lay_out(parameter.data)
        return network

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` on the device, in the memory format that the network computes in."""
        tensor = tensor.to(self.device, non_blocking=True)
        return self.lay_out(tensor) if self.bf16 else tensor

    @staticmethod
    def lay_out(tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in channels-last memory where it has 4 or 5 dimensions, otherwise as it is."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tensor.contiguous(memory_format=formats[tensor.ndim]) if tensor.ndim in formats else tensor

    def __str__(self) -> str:
        return "bf16 autocast, channels last" if self.bf16 else "float32"
