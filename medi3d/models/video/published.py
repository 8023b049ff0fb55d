"""Input and size of each video network, as published. docs/video.md shows the table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Facts of a video network."""

    paper: str
    parameters: float
    """in millions, with 400 classes"""
    counted: str
    """where that number is published"""
    frames: int
    """number of frames that it sees at once"""
    stride: int
    """use every n-th frame of a clip; the two-stream networks and the LSTM choose their own frames"""
    size: int
    """height and width in pixels"""
    channels: int = 3
    """channels of a clip: 3 for RGB, 5 for RGB and flow"""
    pretrained: bool = False
    """whether its encoder has weights: a matching row, or timm's"""


_I3D = "Carreira & Zisserman 2017, arXiv:1705.07750"
_NON_LOCAL = "Wang et al. 2018, arXiv:1711.07971"
_P3D = "Qiu et al. 2017, arXiv:1711.10305"
_R2PLUS1D = "Tran et al. 2018, arXiv:1711.11248"
_SLOWFAST = "Feichtenhofer et al. 2019, arXiv:1812.03982"
_X3D = "Feichtenhofer 2020, arXiv:2004.04730"
_TIMESFORMER = "Bertasius et al. 2021, arXiv:2102.05095"
_SWIN = "Liu et al. 2022, arXiv:2106.13230"
_MVIT = "Fan et al. 2021, arXiv:2104.11227"

_TABLE_1 = "the paper, table 1"
_HALF = "layers of piergiaj/pytorch-i3d, counted; half of the 25 M in the paper's table 1"
_MB = "the paper, table 2: 261 MB at four bytes a number"
_ZOO = "pytorchvideo's model zoo"

PUBLISHED = {
    "convnet_lstm": Published(_I3D, 9.0, _TABLE_1, frames=25, stride=5, size=224, pretrained=True),
    "c3d": Published(_I3D, 79.0, _TABLE_1, frames=16, stride=1, size=112, pretrained=True),
    "two_stream": Published(_I3D, 12.0, _TABLE_1, 10, 1, 224, channels=5, pretrained=True),
    "fused_two_stream": Published(_I3D, 39.0, _TABLE_1, 50, 1, 224, channels=5, pretrained=True),
    "two_stream_i3d": Published(_I3D, 25.0, _TABLE_1, 64, 1, 224, channels=5, pretrained=True),
    "i3d": Published(_I3D, 12.7, _HALF, frames=64, stride=1, size=224, pretrained=True),
    "r50_i3d": Published(_NON_LOCAL, 28.04, _ZOO, frames=8, stride=8, size=224, pretrained=True),
    "r50_nonlocal": Published(
        _NON_LOCAL, 35.3, f"{_SLOWFAST}, table 2", frames=8, stride=8, size=224, pretrained=True
    ),
    "p3d": Published(_P3D, 65.25, _MB, frames=16, stride=1, size=160, pretrained=True),
    "r2plus1d_18": Published(_R2PLUS1D, 31.505, "torchvision, r2plus1d_18", frames=16, stride=1, size=112),
    "timesformer_base": Published(
        _TIMESFORMER, 121.4, "the paper, table 2", frames=8, stride=32, size=224, pretrained=True
    ),
    "video_swin_tiny": Published(
        _SWIN, 28.2, "the paper, table 1", frames=32, stride=2, size=224, pretrained=True
    ),
    "slowfast_r50": Published(_SLOWFAST, 34.48, f"{_ZOO}, 4x16", frames=32, stride=2, size=224),
    "x3d_m": Published(_X3D, 3.79, _ZOO, frames=16, stride=5, size=224),
    "mvit_base": Published(_MVIT, 36.61, "torchvision, mvit_v1_b", frames=16, stride=4, size=224),
}
"""Name -> facts."""
