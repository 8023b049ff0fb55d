"""Networks for volumes."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from medi3d.weights.keymaps.keymap import KeyMap, norm
from medi3d.weights.keymaps.resnet import tensors


def _unet3d(prefix: str, to_our_layout: Callable[[str, Tensor], Tensor], *dropped: str) -> KeyMap:
    """The U-Net of Models Genesis and SuPreM: its encoder, under `prefix`.

    Running statistics are dropped: the published norms always use those of the batch.
    """
    table: dict[str, str | None] = {}
    for stage in ("down_tr64", "down_tr128", "down_tr256", "down_tr512"):
        for unit in (0, 1):
            for part in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"):
                key = f"{stage}.ops.{unit}.{part}"
                table[prefix + key] = key
    decoder = (f"{prefix}up_tr*", f"{prefix}out_tr.*", f"{prefix}down_tr*.running_*")
    counters = (f"{prefix}down_tr*.num_batches_tracked",)
    return KeyMap(table, to_our_layout, (*decoder, *counters, *dropped), stem="down_tr64.ops.0.conv1.weight")


def models_genesis() -> KeyMap:
    """MrGiovanni/ModelsGenesis, Genesis_Chest_CT: kernels over (x, y, z), turned to ours over (z, y, x)."""
    return _unet3d("", from_xyz)


def suprem_unet() -> KeyMap:
    """MrGiovanni/SuPreM's U-Net, inside its text-prompted model, whose prompts and heads are dropped."""
    prompts = ("precls_conv.*", "GAP.*", "controller.*", "organ_embedding*", "text_to_vision.*")
    return _unet3d("backbone.", from_ras, *prompts)


def from_xyz(our_key: str, tensor: Tensor) -> Tensor:
    """Kernels over (x to left, y to posterior, z to superior) -> (D, H, W)."""
    return tensor.permute(0, 1, 4, 3, 2) if tensor.dim() == 5 else tensor


def from_ras(our_key: str, tensor: Tensor) -> Tensor:
    """Kernels over (x to right, y to anterior, z to superior) -> (D, H, W): H and W run the other way."""
    return from_xyz(our_key, tensor).flip(3, 4) if tensor.dim() == 5 else tensor


_NNUNET_BLOCKS = (1, 3, 4, 6, 6, 6)


def nnunet() -> KeyMap:
    """MIC-DKFZ/nnUNet v2: the encoder of a plain or residual U-Net of six stages, plans with kernel 3.

    Its modules register their layers twice (`all_modules`) and the decoder holds the encoder once more;
    the copies and the decoder are dropped.
    """
    table: dict[str, str | None] = {}
    for ours in _nnunet_units():
        for tensor in ("conv.weight", "conv.bias", "norm.weight", "norm.bias"):
            table[f"encoder.{ours}.{tensor}"] = f"{ours}.{tensor}"
    return KeyMap(table, dropped=("*.all_modules.*", "decoder.*"))


def _nnunet_units() -> Iterator[str]:
    yield "stem.convs.0"
    for stage, blocks in enumerate(_NNUNET_BLOCKS):
        yield from (f"stages.{stage}.0.convs.{conv}" for conv in range(2))
        for block in range(blocks):
            parts = ("conv1", "conv2", "skip.0", "skip.1")
            yield from (f"stages.{stage}.blocks.{block}.{part}" for part in parts)


# What nnssl's pretext tasks add to the network: the contrasting head of VoCo, the mask tokens of S3D and its
# second name for the network, the three heads of SwinUNETR (nnssl/architectures).
_PRETEXT = ("projector.*", "architecture.*", "mask_tokens.*", "densify_*", "*_proj_head.*")


def openmind() -> KeyMap:
    """MIC-DKFZ/nnssl: the encoder of a ResEnc-L, pretrained by any of its pretext tasks."""
    map_ = nnunet()
    return replace(map_, dropped=(*map_.dropped, *_PRETEXT), stem="stem.convs.0.conv.weight")


def totalsegmentator() -> KeyMap:
    """wasserth/TotalSegmentator's plain nnU-Nets: kernels over (z, y, x) in RAS, turned to ours."""
    return replace(nnunet(), to_our_layout=from_zyx_of_ras, stem="stages.0.0.convs.0.conv.weight")


def from_zyx_of_ras(our_key: str, tensor: Tensor) -> Tensor:
    """Kernels over (z to superior, y to anterior, x to right) -> (D, H, W): H and W run the other way."""
    return tensor.flip(3, 4) if tensor.dim() == 5 else tensor


def merlin() -> KeyMap:
    """StanfordMIMI/Merlin's image encoder, an inflated ResNet-152 (merlin/models/i3res.py).

    The checkpoint of five-year prediction has the encoder's names bare, the others under
    `encode_image.i3_resnet.`; heads and the text encoder are dropped.
    """
    table: dict[str, str | None] = {}
    for prefix in ("", _MERLIN):
        table |= {f"{prefix}{key}": key for key in tensors(152)}
    heads = ("classifier.*", "contrastive_head.*")
    dropped = (*heads, *(f"{_MERLIN}{head}" for head in heads), "encode_text.*", "logit_scale")
    return KeyMap(table, dropped=dropped, stem="conv1.weight")


_MERLIN = "encode_image.i3_resnet."

_CT_FM_BLOCKS = (1, 2, 2, 4, 4)


def ct_fm() -> KeyMap:
    """project-lighter/CT-FM's SegResEncoder, alone or in a SegResNetDS, whose decoder is dropped."""
    ours = ["conv_init.weight"]
    for level, count in enumerate(_CT_FM_BLOCKS):
        for block in (f"layers.{level}.blocks.{number}" for number in range(count)):
            for unit in (1, 2):
                ours += [f"{block}.conv{unit}.weight", *norm(f"{block}.norm{unit}", "")]
        if level < len(_CT_FM_BLOCKS) - 1:
            ours.append(f"layers.{level}.downsample.weight")
    table: dict[str, str | None] = {f"{prefix}{key}": key for prefix in ("", "encoder.") for key in ours}
    return KeyMap(table, dropped=("up_layers.*",), stem="conv_init.weight")


_SWIN_BLOCK = (
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.relative_position_bias_table", "attn.relative_position_index"),
    *("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"),
    *("mlp.linear1.weight", "mlp.linear1.bias", "mlp.linear2.weight", "mlp.linear2.bias"),
)


def voco() -> KeyMap:
    """Luffy03/Large-Scale-Medical's SwinUNETR (MONAI's, `use_v2`); the decoder is dropped.

    Self-supervised checkpoints end at the encoder's blocks; those of VoComni have a whole U-Net.
    """
    ours = ["swinViT.patch_embed.proj.weight", "swinViT.patch_embed.proj.bias"]
    for stage in range(1, 5):
        layer = f"swinViT.layers{stage}.0"
        ours += [f"{layer}.blocks.{block}.{key}" for block in range(2) for key in _SWIN_BLOCK]
        ours += [f"{layer}.downsample.{key}" for key in ("reduction.weight", "norm.weight", "norm.bias")]
        ours += [f"swinViT.layers{stage}c.0.layer.conv{unit}.conv.weight" for unit in (1, 2)]
    for block in ("encoder1", "encoder2", "encoder3", "encoder4", "encoder10"):
        ours += [f"{block}.layer.conv{unit}.conv.weight" for unit in (1, 2)]
    ours.append("encoder1.layer.conv3.conv.weight")  # the one block that widens
    return KeyMap({key: key for key in ours}, dropped=("decoder?.*", "out.*"))


def anatomix(downs: int = 4, *, affine: bool = True) -> KeyMap:
    """neel-dey/anatomix's U-Net, a list of layers; ours is its first part, up to the bottleneck.

    Args:
        downs: how often it halves the resolution.
        affine: batch norms; otherwise instance norms without parameters, behind convolutions with a bias.
    """
    ours: list[str] = []
    layers = 1 + 2 * (downs + 1)  # convolutions up to the bottleneck, each with norm and activation
    for number in range(layers):
        # A pool comes before every second convolution, starting with the fourth.
        place = 3 * number + max(0, (number - 1) // 2)
        ours.append(f"model.{place}.weight")
        ours += [*norm(f"model.{place + 1}", "")] if affine else [f"model.{place}.bias"]
    decoder = tuple(f"model.{place}.*" for place in range(3 * layers + downs, 8 * downs + 3 * layers + 1))
    return KeyMap({key: key for key in ours}, dropped=decoder, stem="model.0.weight")
