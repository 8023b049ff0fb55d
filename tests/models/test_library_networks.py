"""Sources by name: feature maps of libraries' networks, inflated; MONAI's 2D networks into their 3D twins."""

import pytest
import torch
import torchvision
from monai.networks import nets
from torch import nn

from medi3d.errors import SourceError, WeightsError
from medi3d.inflation import inflate, verify
from medi3d.models.encoders import create_encoder
from medi3d.models.networks import create_segmenter
from medi3d.models.pyramid import extract_pyramid
from medi3d.models.sources import build_source, list_sources
from medi3d.weights.load import inflate_state

PYRAMIDS = {
    "torchvision:resnet18": [64, 64, 128, 256, 512],
    "torchvision:resnext50_32x4d": [64, 256, 512, 1024, 2048],
    "torchvision:densenet121": [64, 256, 512, 1024, 1024],
    "torchvision:vgg11_bn": [64, 128, 256, 512, 512, 512],
    "torchvision:convnext_tiny": [96, 192, 384, 768],
    "torchvision:efficientnet_b0": [16, 24, 40, 112, 1280],
    "torchvision:mobilenet_v2": [16, 24, 32, 96, 1280],
    "torchvision:mobilenet_v3_small": [16, 16, 24, 48, 576],
    "torchvision:regnet_y_400mf": [32, 48, 104, 208, 440],
    "monai:resnet18": [64, 64, 128, 256, 512],
    "monai:densenet121": [64, 256, 512, 1024, 1024],
    "monai:efficientnet-b0": [16, 24, 40, 112, 1280],
    "nnunet:plain": [32, 64, 128, 256, 320, 320],
    "nnunet:residual": [32, 64, 128, 256, 320, 320],
}


@pytest.mark.parametrize("source", PYRAMIDS)
def test_maps_halve_from_level_to_level(source):
    net = build_source(source)
    maps = net(torch.zeros(2, next(net.parameters()).shape[1], 64, 64))
    assert [m.shape[1] for m in maps] == PYRAMIDS[source]
    finest = maps[0].shape[2]
    assert [tuple(m.shape[2:]) for m in maps] == [(finest >> i, finest >> i) for i in range(len(maps))]


@pytest.mark.slow
@pytest.mark.parametrize("source", PYRAMIDS)
def test_sources_inflate_exactly_with_stride_along_depth(source):
    net3d = inflate(build_source(source, levels=4), in_channels=1)
    assert net3d.report.max_rel_error <= 1e-9
    assert net3d.report.exactness.mixes_depth
    assert all(len(set(stride)) == 1 for stride in net3d.strides)


def test_the_maps_are_those_of_the_library():
    torch.manual_seed(0)
    net, seen = torchvision.models.resnet18().eval(), []
    for stage in (net.relu, net.layer1, net.layer2, net.layer3, net.layer4):
        stage.register_forward_hook(lambda m, args, out: seen.append(out))
    image = torch.randn(2, 3, 64, 64)
    net(image)
    answers = list(seen)
    pyramid = extract_pyramid(net).eval()
    assert set(pyramid.state_dict()) == {k for k in net.state_dict() if not k.startswith("fc.")}
    for ours, theirs in zip(pyramid(image), answers, strict=True):
        assert torch.equal(ours, theirs)


def test_levels_cut_the_layers_behind():
    net = build_source("monai:resnet18", levels=2)
    assert list(dict(net.named_children())) == ["conv1", "bn1", "act", "maxpool", "layer1"]
    with pytest.raises(SourceError, match="levels is 6: ResNet has 5 feature maps"):
        build_source("monai:resnet18", levels=6)


def test_blocks_still_know_training_from_evaluation():
    net = build_source("torchvision:efficientnet_b0")
    image = torch.randn(2, 3, 64, 64)
    assert not torch.equal(net(image)[-1], net(image)[-1])
    net.eval()
    assert torch.equal(net(image)[-1], net(image)[-1])


def test_a_library_network_makes_a_segmenter():
    net = create_segmenter("torchvision:mobilenet_v3_small", num_classes=3, levels=3)
    assert net(torch.zeros(1, 1, 9, 33, 32)).shape == (1, 3, 9, 33, 32)


MONAI = {
    "resnet18": lambda dims, channels: nets.resnet18(
        spatial_dims=dims, n_input_channels=channels, num_classes=3
    ),
    "densenet121": lambda dims, channels: nets.DenseNet121(dims, channels, 3),
    "efficientnet-b0": lambda dims, channels: nets.EfficientNetBN(
        "efficientnet-b0", pretrained=False, spatial_dims=dims, in_channels=channels, num_classes=3
    ),
}


@pytest.mark.parametrize("build", MONAI.values(), ids=MONAI)
def test_monai_networks_inflate_into_their_own_3d_twins(build):
    net2d, net3d = build(2, 3), build(3, 1)
    loaded = inflate_state(net2d, net3d)
    proof = verify(net2d, net3d, size=32, depth=32)
    assert proof.max_rel_error <= 1e-9
    assert proof.mixes_depth
    assert proof.levels[0].border_rel_error > 1e-3  # what MONAI's own zero padding does
    assert (loaded.fraction, loaded.adapted) == (1, [next(iter(dict(net2d.named_parameters())))])


@pytest.mark.parametrize("profile", ["mean", "centre"])
def test_a_wrong_tap_in_a_twin_is_found(profile):
    net2d, net3d = MONAI["resnet18"](2, 3), MONAI["resnet18"](3, 3)
    inflate_state(net2d, net3d, profile)
    net3d.layer2[0].conv1.weight.data[:, :, 0] *= 1.01
    proof = verify(net2d, net3d, size=16, depth=16)
    assert (proof.max_rel_error > 1e-9) == (profile == "mean")  # centre has nothing in that tap
    assert "layer2.0.conv1" in proof.failure or profile == "centre"


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_nnunet_encoders_have_a_3d_twin(kind):
    net2d, net3d = build_source(f"nnunet:{kind}", levels=4), create_encoder(f"nnunet3d:{kind}", levels=4)
    assert inflate_state(net2d, net3d).fraction == 1
    proof = verify(net2d, net3d, size=32, depth=16)
    assert proof.max_rel_error <= 1e-9
    assert [level.stride for level in proof.levels] == net3d.strides


def test_averages_that_count_their_padding_are_proven_by_replication_too():
    net2d, net3d = nn.Conv2d(1, 2, 3), nn.Conv3d(1, 2, 3)
    inflate_state(net2d, net3d)
    flat = nn.Sequential(net2d, nn.AvgPool2d(3, 1, 1))
    deep = nn.Sequential(nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0), net3d, nn.AvgPool3d(3, 1, 1))
    state = {f"1.{key}": value for key, value in net2d.state_dict().items()}
    flat = nn.Sequential(nn.Identity(), *flat)
    assert set(flat.state_dict()) == set(state)
    proof = verify(flat, deep, size=16, depth=8)
    assert proof.max_rel_error <= 1e-9 < proof.levels[0].border_rel_error


def test_a_network_of_another_architecture_is_no_twin():
    with pytest.raises(WeightsError, match=r"^2D ResNet: .* has no place in the network;"):
        inflate_state(MONAI["resnet18"](2, 3), MONAI["densenet121"](3, 3))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:resnet19", r"torchvision has no model 'resnet19'; near: resnet18"),
        ("monai:densenet12", r"monai has no model 'densenet12'; near: densenet121"),
        ("torchvison:resnet18", r"unknown source 'torchvison:resnet18': use .*; near: torchvision:resnet18"),
        ("torchvision:", r"unknown source 'torchvision:'"),
        ("torchvision:swin_t", r"SwinTransformer has no feature maps .* not an image encoder"),
        ("torchvision:vit_b_16", r"VisionTransformer takes no \(1, 3, 128, 128\) image"),
    ],
)
def test_unknown_sources_list_near_ones_in_one_line(source, message):
    with pytest.raises(SourceError, match=message) as caught:
        create_encoder(source)
    assert "\n" not in str(caught.value)


def test_sources_are_listed_with_their_library():
    assert {"inception_v1", "timm:resnet18", "torchvision:vgg16", "monai:densenet121"} <= set(list_sources())
