"""Workarounds for 3D convolutions that oneDNN, PyTorch's CPU library, computes wrongly or slowly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RightConv3d(nn.Conv3d):
    """`nn.Conv3d`, padded by a copy where oneDNN would compute wrong gradients: `padded_where_short`."""

    def forward(self, input: Tensor) -> Tensor:
        """Like `nn.Conv3d`."""
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        padding = [one // 2 for one in reach] if self.padding == "same" else self.padding
        copied = self.padding_mode != "zeros" or (self.padding == "same" and any(one % 2 for one in reach))
        if copied or isinstance(padding, str):
            return super().forward(input)
        x, pads = padded_where_short(input, self.weight, self.stride, tuple(padding), self.dilation)
        return F.conv3d(x, self.weight, self.bias, self.stride, pads, self.dilation, self.groups)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """`F.conv2d` or `F.conv3d`, on the CPU by oneDNN wherever the input is in channels-last memory.

    PyTorch gives small convolutions of a single volume to a slow kernel of its own (`use_mkldnn` in
    aten/src/ATen/native/Convolution.cpp), whose output is not channels-last, so that every layer behind it is
    slow too: forward passes of I3D gain a third.
    """
    x, padding = padded_where_short(x, weight, stride, padding, dilation)
    if _for_onednn(x, weight):
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    convolution = F.conv2d if x.dim() == 4 else F.conv3d
    return convolution(x, weight, bias, stride, padding, dilation, groups)


def padded_where_short(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Input and padding of a 3D convolution; a short depth axis is padded by a copy.

    With fewer positions along depth than taps, oneDNN on CPUs with bfloat16 leaves part of the weights'
    gradient uninitialised (seen with torch 2.13: kernel 3 on depth 2,
    kernel 5 on depth 2 to 4; float32, in-plane axes and padded inputs are right).
    """
    if not _is_short(x, weight, stride, padding, dilation):
        return x, padding
    return F.pad(x, (0, 0, 0, 0, padding[0], padding[0])), (0, *padding[1:])


def _is_short(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> bool:
    if x.dim() != 5 or x.device.type != "cpu" or not padding[0]:
        return False
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    if x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return False
    taps = weight.shape[2]
    reach = dilation[0] * (taps - 1) + 1
    return (x.shape[2] + 2 * padding[0] - reach) // stride[0] + 1 < taps


def _for_onednn(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[attr-defined]
        return False
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=layout) and not x.is_contiguous()
