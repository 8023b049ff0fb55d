"""Networks of timm are built for the size of the images that they will see, and train there."""

import pytest
import torch

from medi3d.errors import ShapeError
from medi3d.inflation.image_sizes import find_sizes
from medi3d.inflation.plan import KernelPlan
from medi3d.models.encoders import create_encoder
from medi3d.models.inspection import inspect_source
from medi3d.models.networks import create_classifier, create_segmenter
from medi3d.models.sources import build_source
from medi3d.models.timm_networks import resized

FIXED = "timm:pit_ti_224"
"""A network with position embeddings for one size of image, which timm builds for another."""


@pytest.mark.parametrize(("size", "only"), [(None, 224), (40, 64), (96, 96)])
def test_a_network_of_one_size_is_built_for_that_size(size, only):
    assert find_sizes(build_source(FIXED, size=size)).only == only


@pytest.mark.parametrize("source", ["timm:test_vit", "timm:test_resnet"])
def test_a_network_of_any_size_ignores_the_size(source):
    nets = [build_source(source, size=size) for size in (None, 40)]
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()
    assert all(find_sizes(net).only is None for net in nets)


@pytest.mark.parametrize("name", ["test_vit", "pit_ti_224"], ids=["any size", "timm cannot resample it"])
def test_a_network_whose_weights_do_not_follow_stays(name):
    net = build_source(f"timm:{name}")
    assert resized(net, name, None, 64) is net


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("source", ["timm:test_vit", FIXED])
def test_a_segmenter_on_a_transformer_trains_at_the_size_of_the_patch(source, channels):
    net = create_segmenter(source, num_classes=2, in_channels=channels, size=48, proof=False)
    logits = net(torch.randn(1, channels, 20, 48, 33))
    assert logits.shape == (1, 2, 20, 48, 33)
    logits.square().mean().backward()
    assert any(bool(p.grad.any()) for p in net.encoder.parameters() if p.grad is not None)


def test_a_larger_volume_is_refused_with_the_size_to_build_for():
    net = create_classifier(FIXED, num_classes=2, size=48, proof=False).eval()
    assert net(torch.randn(1, 1, 32, 40, 48)).shape == (1, 2)
    with pytest.raises(ShapeError, match="build it with size=80"):
        net(torch.randn(1, 1, 32, 80, 48))


def test_a_transformer_is_proven_at_the_size_of_the_patch():
    assert create_encoder("timm:test_vit", size=48).report.exactness.size == 48


def test_inspection_takes_a_network_of_one_size():
    assert inspect_source(FIXED, KernelPlan.isotropic(), size=48)["multiply_adds"] > 0
