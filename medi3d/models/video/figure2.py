"""The five architectures of Figure 2 of the I3D paper, and I3D itself, on one Inception-V1.

Carreira & Zisserman 2017, arXiv:1705.07750, sections 2 and 3, table 1. Inception-V1 runs on frames under
the plan `planar` (a, c, d), on clips under `video` (e); C3D (b) is a VGG-11 under `isotropic`.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from medi3d.errors import ShapeError
from medi3d.inflation.network import build
from medi3d.inflation.plan import KernelPlan
from medi3d.models.classifier import Classifier
from medi3d.models.inception import Logits
from medi3d.models.video.registry import FLOW, RGB, VideoOptions, over_windows, register_video
from medi3d.weights.catalogue import get_row, read_classes
from medi3d.weights.load import load_weights

STACK = 10
"""Flow fields that a network sees with one RGB frame (Simonyan & Zisserman 2014, arXiv:1406.2199)."""
FUSED_FRAMES = 5
"""RGB frames that the fused network sees, one stack apart."""


class ConvNetLSTM(nn.Module):
    """(a) A 2D network on frames, and an LSTM over their features; each step predicts the class.

    Uses every fifth frame of a clip at 25 frames per second. In training it returns the logits of all steps,
    `(B, classes, steps)`; otherwise those of the last.
    """

    EVERY = 5

    def __init__(self, encoder: nn.Module, num_classes: int, dropout: float) -> None:
        super().__init__()
        streams: Any = encoder  # an encoder, or streams that are fused, which have no strides
        width = streams.out_channels[-1]
        self.encoder = encoder
        self.norm = nn.BatchNorm1d(width)
        self.lstm = nn.LSTM(width, 512, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, num_classes))

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> logits."""
        maps = self.encoder(clip[:, :, :: self.EVERY])[-1]
        pooled = self.norm(maps.mean(dim=(3, 4)))  # (B, 1024, steps)
        steps, _ = self.lstm(pooled.transpose(1, 2))
        return self.head(steps).transpose(1, 2) if self.training else self.head(steps[:, -1])


class C3D(nn.Module):
    """(b) A 3D VGG: eight convolutions, five pools, two fully connected layers, each with batch norm.

    Sees 16 frames of 112×112; a longer clip is covered by windows whose logits are averaged.
    Tran et al. 2015, arXiv:1412.0767, with the I3D paper's batch norms and its stride 2 in the first pool.
    """

    FRAMES, SIZE = 16, 112

    def __init__(self, encoder: nn.Module, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        widths = (512 * 4 * 4, 4096, 4096)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
            layers += [nn.Dropout(dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, C, T, 112, 112)`, T at least 16 -> logits `(B, num_classes)`.

        Raises:
            ShapeError: frames of another size, too few of them, or a batch of one clip in training.
        """
        if clip.shape[3:] != (self.SIZE, self.SIZE):
            size = tuple(clip.shape[3:])
            raise ShapeError(f"c3d takes frames of {self.SIZE}x{self.SIZE}, not {size}: set data.crop to 112")
        if self.training and len(clip) == 1:
            raise ShapeError("c3d normalises over the batch: set training.batch_size to 2 or more")
        return over_windows(lambda window: self.head(self.encoder(window)[-1]), clip, self.FRAMES)


class TwoStream(nn.Module):
    """A network for RGB and one for flow, each trained on its own loss and combined for prediction.

    Takes clips of five channels: RGB, then flow. In training it returns a list of both streams' logits; their
    losses are added, and no gradient passes between the streams.
    """

    def __init__(self, rgb: nn.Module, flow: nn.Module, *, add: bool = False) -> None:
        super().__init__()
        self.rgb, self.flow, self.add = rgb, flow, add

    @property
    def encoder(self) -> nn.ModuleList:
        """Both streams' encoders: what the strategy `fixed` freezes."""
        streams: list[Any] = [self.rgb, self.flow]
        return nn.ModuleList([stream.encoder for stream in streams])

    def forward(self, clip: Tensor) -> Tensor | list[Tensor]:
        """`(B, 5, T, H, W)` -> logits `(B, num_classes)`, added or averaged; in training a list of two."""
        logits = [self.rgb(clip[:, RGB]), self.flow(clip[:, FLOW])]
        if self.training:
            return logits
        joined = torch.stack(logits)
        return joined.sum(dim=0) if self.add else joined.mean(dim=0)


class MiddleFrame(Classifier):
    """The RGB half of (c): every tenth frame; for a longer clip the mean over its frames."""

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, 3, T, H, W)`, T at least 10 -> logits."""
        return over_windows(lambda window: super(MiddleFrame, self).forward(frames_of(window)), clip, STACK)


class FlowStack(Classifier):
    """The flow half of (c): ten fields as one image of twenty channels; the mean over stacks."""

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, 2, T, H, W)`, T at least 10 -> logits."""
        return over_windows(lambda window: super(FlowStack, self).forward(stacks_of(window)), clip, STACK)


def frames_of(clip: Tensor) -> Tensor:
    """The middle frame of every stack: `(B, C, n·10, H, W)` -> `(B, C, n, H, W)`."""
    return clip[:, :, STACK // 2 :: STACK]


def stacks_of(clip: Tensor) -> Tensor:
    """The frames of every stack as channels: `(B, C, n·10, H, W)` -> `(B, 10·C, n, H, W)`."""
    return clip.unflatten(2, (-1, STACK)).transpose(1, 2).transpose(2, 3).flatten(2, 3).transpose(1, 2)


class FusedStreams(nn.Module):
    """The encoder of (d): the streams' last maps, joined by a 3×3×3 convolution and a 3×3×3 max-pool.

    For clips with a single stream the other network is None.
    """

    def __init__(self, rgb: nn.Module | None, flow: nn.Module | None) -> None:
        super().__init__()
        streams: list[Any] = [stream for stream in (rgb, flow) if stream is not None]
        self.rgb, self.flow = rgb, flow
        self.out_channels = [512]
        self.fusion = nn.Sequential(
            nn.Conv3d(sum(s.out_channels[-1] for s in streams), 512, 3, padding=1, bias=False),
            nn.BatchNorm3d(512),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(3, stride=2, padding=1),
        )
        for parameter in self.fusion[0].parameters():
            nn.init.kaiming_normal_(parameter)

    def forward(self, clip: Tensor) -> list[Tensor]:
        """`(B, 5, 50, H, W)`, or 3 or 2 channels -> one map `(B, 512, 3, H/64, W/64)`."""
        maps = []
        if self.rgb is not None:
            maps.append(self.rgb(frames_of(clip[:, RGB]))[-1])
        if self.flow is not None:
            maps.append(self.flow(stacks_of(clip[:, -2:]))[-1])
        return [self.fusion(torch.cat(maps, dim=1))]


class FusedTwoStream(Classifier):
    """(d) 3D-fused two-stream (Feichtenhofer et al. 2016, arXiv:1604.06573): a mean over windows of 50."""

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, 5, T, H, W)` (3 or 2 channels: one stream), T at least 50 -> logits."""
        frames = STACK * FUSED_FRAMES
        return over_windows(super().forward, clip, frames)


class I3D(nn.Module):
    """Inception-V1 under the plan `video` with the published head: mean logits over windows of time."""

    def __init__(self, encoder: nn.Module, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        streams: Any = encoder
        self.head, _ = build(Logits(streams.out_channels[-1], num_classes, dropout), KernelPlan.video())

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> logits `(B, num_classes)`."""
        maps = self.encoder(clip)[-1]
        if min(maps.shape[3:]) < 7:  # frames below 193×193: the 7×7 pool gets the mean directly
            maps = maps.mean(dim=(3, 4), keepdim=True).expand(-1, -1, -1, 7, 7)
        return self.head(maps).mean(dim=2)

    def load(self, weights: str) -> None:
        """Fill the trunk, and the head if the number of classes is the published one."""
        row = get_row(weights)
        trunk: Any = self.encoder
        named: Any = self.head.network
        joined = nn.Sequential(OrderedDict([*trunk.network.named_children(), ("Logits", named)]))
        fits = row.classes is not None and len(read_classes(row)) == named.Conv3d_0c_1x1.weight.shape[0]
        report = load_weights(joined, row, expect_missing=() if fits else ("Logits.*",))
        trunk.report.weights |= report.to_dict()


def _frames_encoder(options: VideoOptions, in_channels: int, weights: str | None) -> nn.Module:
    return options.encoder("inception_v1", "planar", in_channels=in_channels, weights=weights)


def _build_i3d(options: VideoOptions, in_channels: int, weights: str | None) -> I3D:
    encoder = options.encoder(
        "inception_v1", "video", in_channels=in_channels, weights=weights, read_weights=False
    )
    network = I3D(encoder, options.num_classes, options.dropout)
    if weights is not None and options.read_weights:
        network.load(weights)
    return network


@register_video("convnet_lstm")
def _convnet_lstm(options: VideoOptions) -> nn.Module:
    encoder = _frames_encoder(options, options.in_channels, options.weights)
    return ConvNetLSTM(encoder, options.num_classes, options.dropout)


@register_video("c3d")
def _c3d(options: VideoOptions) -> nn.Module:
    encoder = options.encoder("timm:vgg11_bn", "isotropic", edit=_round_pools_up)
    return C3D(encoder, options.num_classes, options.dropout)


def _round_pools_up(vgg: nn.Module) -> None:
    for layer in vgg.modules():
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True  # 7×7 -> 4×4, as C3D pads its last pool


@register_video("two_stream")
def _two_stream(options: VideoOptions) -> nn.Module:
    rgb, flow = _frame_streams(options)
    head: dict[str, Any] = {"num_classes": options.num_classes, "dropout": options.dropout}
    return _joined(rgb and MiddleFrame(rgb, **head), flow and FlowStack(flow, **head))


@register_video("fused_two_stream")
def _fused_two_stream(options: VideoOptions) -> nn.Module:
    encoder = FusedStreams(*_frame_streams(options))
    return FusedTwoStream(encoder, options.num_classes, dropout=options.dropout)


def _frame_streams(options: VideoOptions) -> tuple[nn.Module | None, nn.Module | None]:
    rgb, flow = options.stream_weights()
    return (
        _frames_encoder(options, 3, rgb) if options.in_channels != 2 else None,
        _frames_encoder(options, 2 * STACK, flow) if options.in_channels != 3 else None,
    )


def _joined(rgb: nn.Module | None, flow: nn.Module | None, *, add: bool = False) -> nn.Module:
    """Both streams, or the one in the clips."""
    if rgb is not None and flow is not None:
        return TwoStream(rgb, flow, add=add)
    (alone,) = (stream for stream in (rgb, flow) if stream is not None)
    return alone


@register_video("two_stream_i3d")
def _two_stream_i3d(options: VideoOptions) -> nn.Module:
    rgb, flow = options.stream_weights()
    return _joined(
        _build_i3d(options, 3, rgb) if options.in_channels != 2 else None,
        _build_i3d(options, 2, flow) if options.in_channels != 3 else None,
        add=True,
    )


@register_video("i3d")
def _i3d(options: VideoOptions) -> nn.Module:
    return _build_i3d(options, options.in_channels, options.weights)
