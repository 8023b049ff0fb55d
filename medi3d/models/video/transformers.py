"""Video transformers: two that start as image transformers of timm, and MViT."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from medi3d import torchvision_shim
from medi3d.errors import ShapeError
from medi3d.inflation.fold import Fold
from medi3d.inflation.plan import DepthLayer, KernelPlan, Override
from medi3d.inflation.rules import Rule, register_rule
from medi3d.models.classifier import Classifier
from medi3d.models.contract import normaliser_of
from medi3d.models.encoders import draw_kernels
from medi3d.models.video.registry import VideoOptions, over_windows, register_video
from medi3d.models.video.residual import frame_wise

torchvision_shim.install()
import timm  # noqa: E402 - timm and torchvision need the shim
import torch  # noqa: E402
from torchvision.models.video import mvit_v1_b  # noqa: E402


class TimeEmbedding(nn.Identity):
    """Where a vision transformer's tokens get their frame's position; in 2D it does nothing."""

    def __init__(self, frames: int, width: int, prefix: int) -> None:
        super().__init__()
        self.frames, self.width, self.prefix = frames, width, prefix


@register_rule(TimeEmbedding)
class TimeEmbeddingRule(Rule):
    """A vector per frame, added to its tokens except the class token; all start at zero (TimeSformer).

    A clip of another length uses the nearest vectors, as in the authors' code.
    """

    kind = "other"

    def __init__(self, layer: TimeEmbedding, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__(layer, depth, fold, profile)
        self.prefix = layer.prefix
        self.weight = nn.Parameter(torch.zeros(layer.frames, layer.width))

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Any:
        """It has none."""
        return (1, 1), (1, 1), (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B·T, tokens, C)`, unchanged in shape."""
        slices = x.shape[0] // self.fold.batch
        frames = F.interpolate(self.weight.t()[None], size=slices)[0].t()  # (T, C)
        places = x[:, self.prefix :].unflatten(0, (-1, slices)) + frames[:, None]
        return torch.cat([x[:, : self.prefix], places.flatten(0, 1)], dim=1)


class ClassToken(nn.Module):
    """A vision transformer as an encoder whose one map is its class token, `(N, C, 1, 1)`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image `(N, 3, H, W)` -> `[(N, C, 1, 1)]`."""
        net: Any = self.net
        return [net.forward_features(x)[:, 0, :, None, None]]


class LastMap(ClassToken):
    """A Swin transformer as an encoder with one map, that after its last norm."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image `(N, 3, H, W)` -> `[(N, C, H/32, W/32)]`."""
        net: Any = self.net
        return [net.forward_features(x).permute(0, 3, 1, 2)]


def _from_timm(name: str, options: VideoOptions, **settings: Any) -> Any:
    pretrained = options.weights == "timm" and options.read_weights
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **settings)


def _classifier(net2d: nn.Module, name: str, plan: KernelPlan, options: VideoOptions) -> nn.Module:
    """The classifier of a network with timm's weights of `name`, if any, and their input contract."""
    pretrained = options.weights == "timm"
    normaliser = normaliser_of(name, options.in_channels) if pretrained and options.contract else None
    inside = options.in_channels if normaliser is None else normaliser.channels
    own = None if pretrained else options.weights
    encoder: Any = options.encoder(net2d, plan, in_channels=inside, weights=own)
    encoder.in_channels, encoder.normaliser = options.in_channels, normaliser
    if options.weights is None:
        draw_kernels(encoder)
    return Classifier(encoder, options.num_classes, dropout=options.dropout)


@register_video("timesformer_base")
def _timesformer_base(options: VideoOptions) -> nn.Module:
    name = "vit_base_patch16_224"
    net = _from_timm(name, options, dynamic_img_size=True)
    net.norm_pre = TimeEmbedding(8, net.embed_dim, net.num_prefix_tokens)
    plan = frame_wise("timesformer", attention="all", attention_form="divided", statistics="volume")
    return _classifier(ClassToken(net), name, plan, options)


@register_video("video_swin_tiny")
def _video_swin_tiny(options: VideoOptions) -> nn.Module:
    name = "swin_tiny_patch4_window7_224"
    net = _from_timm(name, options, strict_img_size=False, dynamic_img_size=True)
    tubelets = Override("net.patch_embed.proj", kernel=2, stride=2)
    plan = frame_wise("video_swin", tubelets, attention=8, attention_form="windows")
    return _classifier(LastMap(net), name, plan, options)


class MViT(nn.Module):
    """torchvision's MViT-B, whose positions are fixed: 16 frames of 224×224; the mean over windows of 16."""

    FRAMES, SIZE = 16, 224

    def __init__(self, num_classes: int, in_channels: int, dropout: float) -> None:
        super().__init__()
        net: Any = mvit_v1_b(num_classes=num_classes, dropout=dropout)
        if in_channels != 3:
            old = net.conv_proj
            size = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
            net.conv_proj = nn.Conv3d(in_channels, old.out_channels, **size)
        self.head, net.head = net.head, nn.Identity()
        self.encoder = net

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, C, T, 224, 224)`, T at least 16 -> logits `(B, num_classes)`.

        Raises:
            ShapeError: frames of another size, or too few of them.
        """
        if clip.shape[3:] != (self.SIZE, self.SIZE):
            size = tuple(clip.shape[3:])
            raise ShapeError(f"mvit_base takes frames of 224x224, not {size}: set data.crop to 224")
        return over_windows(lambda window: self.head(self.encoder(window)), clip, self.FRAMES)


@register_video("mvit_base")
def _mvit_base(options: VideoOptions) -> nn.Module:
    return MViT(options.num_classes, options.in_channels, options.dropout)
