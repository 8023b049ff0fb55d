"""Networks for clips other than I3D: R(2+1)D, r3d and ir-CSN."""

from medi3d.weights.keymaps.keymap import KeyMap, norm
from medi3d.weights.keymaps.resnet import tensors, units

R3D_DEPTHS = (18, 34, 50, 101, 152, 200)
IRCSN_DEPTHS = (50, 152)


def torchvision_r2plus1d_18() -> KeyMap:
    """torchvision's r2plus1d_18 -> our encoder; its head is dropped. It pads time with zeros.

    Each convolution is a list in torchvision: in-plane, norm, ReLU, along time
    (torchvision/models/video/resnet.py).
    """
    table = _two_plus_one("stem", "conv1") | norm("stem.4", "bn1")
    for block in (f"layer{stage}.{number}" for stage in range(1, 5) for number in range(2)):
        for conv in (1, 2):
            table |= _two_plus_one(f"{block}.conv{conv}.0", f"{block}.conv{conv}")
            table |= norm(f"{block}.conv{conv}.1", f"{block}.bn{conv}")
        if block.endswith(".0") and not block.startswith("layer1"):
            table[f"{block}.downsample.0.weight"] = f"{block}.downsample.0.weight"
            table |= norm(f"{block}.downsample.1", f"{block}.downsample.1")
    return KeyMap(table, dropped=("fc.*",))


def _two_plus_one(published: str, ours: str) -> dict[str, str | None]:
    table: dict[str, str | None] = {f"{published}.0.weight": f"{ours}.spatial.weight"}
    return (
        table | norm(f"{published}.1", f"{ours}.norm") | {f"{published}.3.weight": f"{ours}.temporal.weight"}
    )


def r3d(depth: int) -> KeyMap:
    """kenshohara/3D-ResNets-PyTorch, models/resnet.py; ours has its names. The classifier is dropped."""
    return KeyMap({key: key for key in tensors(depth)}, dropped=("fc.*",), stem="conv1.weight")


def mmaction_ircsn(depth: int) -> KeyMap:
    """open-mmlab/mmaction2's ResNet3dCSN, bottleneck mode "ir"; its classifier is dropped.

    Convolution and norm are one module there, and the second convolution of a block is a list of one
    (mmaction/models/backbones/resnet3d_csn.py).
    """
    table: dict[str, str | None] = {}
    for conv, bn in units(depth):
        theirs = conv.removesuffix(".0") if "downsample" in conv else conv
        theirs = f"backbone.{theirs}.0" if theirs.endswith(".conv2") else f"backbone.{theirs}"
        table[f"{theirs}.conv.weight"] = f"{conv}.weight"
        table |= norm(f"{theirs}.bn", bn)
    return KeyMap(table, dropped=("cls_head.*",), stem="conv1.weight")
