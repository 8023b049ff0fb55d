"""Encoder, U-Net decoder and head for volumes of any size."""

from collections.abc import Sequence

from torch import Tensor, nn

from medi3d.axes import DEPTH, Triple
from medi3d.errors import ConfigError, ShapeError
from medi3d.inflation.image_sizes import dry_run
from medi3d.inflation.rules import Rule
from medi3d.models.alignment import check_strides
from medi3d.models.decoder import Decoder, SubpixelHead
from medi3d.models.encoder import as_encoder

HEADS = ("convolution", "subpixel")


class Segmenter(nn.Module):
    """Encoder, U-Net decoder, 1×1×1 head: `(B, C, D, H, W)` -> logits `(B, num_classes, D, H, W)`.

    Takes any size. With the head "subpixel" the decoder ends at the encoder's finest map, and each
    position gives the logits of all its voxels, in half the time (docs/decisions.md, 44). In training mode
    with deep supervision it returns a list of logits, finest first, each at the resolution of its decoder
    level (the first at the volume's); otherwise one tensor.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        *,
        channels: Sequence[int] | None = None,
        norm: str = "instance",
        deep_supervision: bool = False,
        head: str = "convolution",
    ) -> None:
        super().__init__()
        check_head(head)
        check_strides(encoder)
        declared = as_encoder(encoder)
        self.encoder = encoder
        self.decoder = Decoder(
            declared.in_channels,
            declared.out_channels,
            declared.strides,
            channels,
            norm,
            full_resolution=head == "convolution",
        )
        coarser = self.decoder.out_channels[1:] if deep_supervision else []
        first = finest_head(self.decoder, num_classes)
        self.heads = nn.ModuleList([first, *(nn.Conv3d(width, num_classes, 1) for width in coarser)])
        self.coarsest: Triple = declared.strides[-1]
        whole = _drops_ends(encoder) or _moves_with_size(encoder)
        self.multiple: Triple = self.coarsest if whole else (1, 1, 1)
        sizes = getattr(encoder, "sizes", None)
        self.fixed = sizes is not None and sizes.only is not None
        if self.fixed:  # the encoder pads height and width to the only size that it takes
            self.multiple = (self.multiple[0], 1, 1)

    def forward(self, volume: Tensor) -> Tensor | list[Tensor]:
        """`(B, C, D, H, W)` -> logits of the same size.

        Raises:
            ShapeError: the input is not 5-D, is empty, or has another number of channels.
        """
        if volume.dim() != 5 or 0 in volume.shape:
            raise ShapeError(
                f"a segmenter takes (B, C, D, H, W) with no empty axis, not {tuple(volume.shape)}"
            )
        size = volume.shape[DEPTH:]
        padded = pad_to(volume, _padded_size(size, self.coarsest, self.multiple, self.fixed))
        maps = self.decoder(padded, self.encoder(padded))
        finest = self.heads[0](maps[0])[:, :, : size[0], : size[1], : size[2]]
        if not self.training or len(self.heads) == 1:
            return finest
        return [finest, *(head(x) for head, x in zip(self.heads[1:], maps[1:], strict=True))]


def finest_head(decoder: Decoder, outputs: int) -> nn.Module:
    """The head that turns the decoder's finest map into `outputs` numbers per voxel."""
    width = decoder.out_channels[0]
    if decoder.finest == (1, 1, 1):
        return nn.Conv3d(width, outputs, 1)
    return SubpixelHead(width, outputs, decoder.finest)


def check_head(head: str) -> None:
    """Refuse a head that is not in `HEADS`.

    Raises:
        ConfigError: it is not.
    """
    if head not in HEADS:
        raise ConfigError(f"network.head is {head!r}: use {' or '.join(HEADS)}")


def _padded_size(size: Sequence[int], coarsest: Triple, multiple: Triple, fixed: bool) -> list[int]:
    """The size to which a volume is padded: a multiple, and more than one position at the coarsest level.

    Norms take statistics over positions, and a single position has none: the axis that needs least padding
    gets a second; depth where height and width are fixed.
    """
    enough = list(size)
    if all(s <= c for s, c in zip(size, coarsest, strict=True)):
        axis = 0 if fixed else min(range(3), key=lambda a: coarsest[a] - size[a])
        enough[axis] = coarsest[axis] + 1
    return [s + -s % m for s, m in zip(enough, multiple, strict=True)]


def pad_to(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat the far ends of `(B, C, D, H, W)` up to that (depth, height, width)."""
    depth, height, width = (wanted - have for wanted, have in zip(size, volume.shape[DEPTH:], strict=True))
    if not depth + height + width:
        return volume
    return nn.functional.pad(volume, (0, width, 0, height, 0, depth), mode="replicate")


def _moves_with_size(encoder: nn.Module) -> bool:
    """Whether features shift between odd and even sizes.

    TensorFlow's "same" depends on the input's size: before a strided layer of kernel 7 it adds two voxels
    for an even size and three for an odd one, and likewise at every level. A network trained on patches of
    one size would find all its features shifted in a volume of another.
    """
    return any(isinstance(r, Rule) and r.same and max(r.stride_2d) > 1 for r in encoder.modules())


def _drops_ends(encoder: nn.Module) -> bool:
    """Whether strided layers skip voxels at the far end of sizes that they do not divide.

    Encoders whose levels have ceil(size / stride) positions see every voxel; for the others the input must be
    padded to a multiple of the largest stride.
    """
    declared = as_encoder(encoder)
    size = [2 * max(stride) - 1 for stride in zip(*declared.strides, strict=True)]
    shapes = dry_run(encoder, size)
    if shapes is None:  # too small for this network, or not the multiple that it needs
        return True
    return any(
        list(shape[DEPTH:]) != [-(-s // t) for s, t in zip(size, stride, strict=True)]
        for shape, stride in zip(shapes, declared.strides, strict=True)
    )
