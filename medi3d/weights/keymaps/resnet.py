"""3D ResNets whose parameters have torchvision's names: MedicalNet's, and tables for other key maps."""

from collections.abc import Iterator

from medi3d.weights.keymaps.keymap import NORM, KeyMap

BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Blocks in each stage, by depth: basic ones up to 34, bottlenecks from 50."""

MEDICALNET_DEPTHS = tuple(BLOCKS)


def units(depth: int, *, type_a: bool = False) -> Iterator[tuple[str, str]]:
    """Every convolution of a ResNet with the norm behind it, by name, in the order of the layers.

    Shortcuts of type A have no parameters. With type B the first block of a stage has one, in `layer1` only
    if it widens (bottlenecks).
    """
    bottleneck = depth >= 50
    yield "conv1", "bn1"
    for stage, count in enumerate(BLOCKS[depth], start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            yield from ((f"{name}.conv{i}", f"{name}.bn{i}") for i in range(1, 4 if bottleneck else 3))
            if block == 0 and not type_a and (stage > 1 or bottleneck):
                yield f"{name}.downsample.0", f"{name}.downsample.1"


def tensors(depth: int, *, type_a: bool = False) -> list[str]:
    """Names of a ResNet's tensors except those of its head."""
    return [
        key
        for conv, norm in units(depth, type_a=type_a)
        for key in (f"{conv}.weight", *(f"{norm}.{tensor}" for tensor in NORM))
    ]


def medicalnet(depth: int) -> KeyMap:
    """Tencent/MedicalNet's ResNet of that depth; ours has its names. The segmentation head is dropped."""
    keys = tensors(depth, type_a=depth in (18, 34))
    return KeyMap({key: key for key in keys}, dropped=("conv_seg.*",), stem="conv1.weight")
