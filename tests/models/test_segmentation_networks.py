"""Whole 2D segmentation networks of the libraries: exact, depth restored, segmenters with a fresh head."""

import monai.networks.nets as monai_nets
import pytest
import torch
from torch import nn

from medi3d.errors import ShapeError, SourceError
from medi3d.inflation import inflate
from medi3d.models.networks import create_segmenter
from medi3d.models.whole import main_output, with_fresh_head


def smp(name):
    def make():
        library = pytest.importorskip("segmentation_models_pytorch")
        return getattr(library, name)("resnet18", encoder_weights=None, in_channels=3, classes=2)

    return make


def torchvision(name, **options):
    def make():
        from torchvision.models import segmentation

        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3, **options)

    return make


SMALL = {
    "kernel_size": [3] * 4,
    "strides": [1, 2, 2, 2],
    "upsample_kernel_size": [2] * 3,
    "filters": [8, 8, 16, 16],
}
MONAI = {
    "UNet": lambda: monai_nets.UNet(2, 1, 2, (4, 8, 16), (2, 2), num_res_units=2),
    "BasicUNet": lambda: monai_nets.BasicUNet(2, 1, 2, features=(4, 4, 8, 8, 16, 4)),
    "BasicUNet-pixelshuffle": lambda: monai_nets.BasicUNet(
        2, 1, 2, features=(4, 4, 8, 8, 16, 4), upsample="pixelshuffle"
    ),
    "DynUNet": lambda: monai_nets.DynUNet(2, 1, 2, **SMALL),
    "DynUNet-supervised": lambda: monai_nets.DynUNet(2, 1, 2, **SMALL, deep_supervision=True),
    "AttentionUnet": lambda: monai_nets.AttentionUnet(2, 1, 2, (4, 8, 16), (2, 2)),
    "FlexibleUNet": lambda: monai_nets.FlexibleUNet(3, 2, "resnet18", pretrained=False, spatial_dims=2),
    "SegResNet": lambda: monai_nets.SegResNet(2, 8, 1, 2),
    "UNETR": lambda: monai_nets.UNETR(
        1, 2, 64, feature_size=4, hidden_size=16, mlp_dim=16, num_heads=2, spatial_dims=2
    ),
    "SwinUNETR": lambda: monai_nets.SwinUNETR(1, 2, spatial_dims=2, feature_size=12),
}
SMP = [
    *("Unet", "UnetPlusPlus", "FPN", "Linknet", "PAN", "MAnet"),
    *("DeepLabV3", "DeepLabV3Plus", "PSPNet", "Segformer", "UPerNet"),
]
TORCHVISION = {
    "FCN": torchvision("fcn_resnet50", aux_loss=True),
    "DeepLabV3": torchvision("deeplabv3_mobilenet_v3_large", aux_loss=True),
    "LRASPP": torchvision("lraspp_mobilenet_v3_large"),
}
QUICK = {"UNet", "DynUNet", "DynUNet-supervised", "AttentionUnet", "SegResNet", "UNETR"}
NETWORKS = [
    *(
        pytest.param(make, id=f"monai-{name}", marks=() if name in QUICK else pytest.mark.slow)
        for name, make in MONAI.items()
    ),
    *(pytest.param(smp(name), id=f"smp-{name}", marks=pytest.mark.slow) for name in SMP),
    *(
        pytest.param(make, id=f"torchvision-{name}", marks=() if name == "LRASPP" else pytest.mark.slow)
        for name, make in TORCHVISION.items()
    ),
]


@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_is_exact_at_full_resolution_and_restores_every_depth(make):
    net3d = inflate(make()).eval()
    assert net3d.report.max_rel_error <= 1e-9
    assert net3d.report.exactness.mixes_depth
    assert set(net3d.strides) == {(1, 1, 1)}
    size = net3d.report.exactness.size
    for depth in (4, 5):
        outputs = net3d(torch.zeros(1, net3d.in_channels, depth, size, size))
        for output in outputs.values() if isinstance(outputs, dict) else [outputs]:
            assert output.shape[2:] == (depth, size, size)


@pytest.mark.parametrize("make", NETWORKS)
def test_is_a_segmenter_with_a_fresh_head(make):
    net2d = make()
    if getattr(net2d, "deep_supervision", False):
        with pytest.raises(SourceError, match="has deep supervision"):
            create_segmenter(net2d, num_classes=5)
        return
    channels = next(m.in_channels for m in net2d.modules() if isinstance(m, nn.Conv2d))
    before = {name: tensor.clone() for name, tensor in net2d.state_dict().items()}
    segmenter = create_segmenter(net2d, num_classes=5, in_channels=channels, plan="planar").train()
    size = segmenter.network.report.exactness.size
    logits = segmenter(torch.randn(2, channels, 3, size, size))
    assert logits.shape == (2, 5, 3, size, size)
    logits.square().mean().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net2d.state_dict().items())
    main_output(net2d.train()(torch.randn(2, channels, size, size))).square().mean().backward()
    learnt = {name for name, parameter in net2d.named_parameters() if parameter.grad is not None}
    assert learnt == {n for n, p in segmenter.network.network.named_parameters() if p.grad is not None}


class Tiny(nn.Module):
    """Two steps down and up, a head, and what may stand behind it."""

    def __init__(self, *behind, classes=2):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.up = nn.Upsample(scale_factor=4, mode="bilinear")
        self.head = nn.Sequential(nn.Conv2d(4, classes, 1), *behind)

    def forward(self, x):
        return self.head(self.up(self.b(self.a(x))))


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(
    "behind",
    [[], [nn.Sigmoid()], [nn.BatchNorm2d(2)], [nn.PReLU(2)], [nn.Conv2d(2, 2, 3, padding=1)]],
    ids=["head", "activation", "norm", "prelu", "head behind a head"],
)
def test_what_stands_behind_the_head_follows(behind, classes):
    segmenter = create_segmenter(Tiny(*behind), num_classes=classes)
    assert segmenter(torch.zeros(1, 1, 7, 9, 10)).shape == (1, classes, 7, 9, 10)


def test_only_the_head_is_fresh():
    net2d = Tiny()
    fresh = with_fresh_head(net2d, 2)
    kept = {
        name: torch.equal(tensor, net2d.state_dict()[name]) for name, tensor in fresh.state_dict().items()
    }
    assert [name for name, same in kept.items() if not same] == ["head.0.weight", "head.0.bias"]


def test_a_network_without_a_head_is_refused():
    with pytest.raises(SourceError, match=r"ends in 'head.1' \(Bilinear|cannot give 3 classes"):
        create_segmenter(Tiny(nn.GroupNorm(1, 2)), num_classes=3)


@pytest.mark.parametrize("option", [{"norm": "batch"}, {"deep_supervision": True}, {"levels": 2}], ids=str)
def test_options_of_a_decoder_are_refused(option):
    with pytest.raises(SourceError, match=f"with its own decoder: leave out '{next(iter(option))}'"):
        create_segmenter(Tiny(), num_classes=3, **option)


def test_sizes_that_a_network_does_not_take_are_told():
    segmenter = create_segmenter(MONAI["UNETR"](), num_classes=2, plan="planar")
    with pytest.raises(ShapeError, match=r"takes no volume of \(3, 96, 96\) voxels"):
        segmenter(torch.zeros(1, 1, 3, 96, 96))
