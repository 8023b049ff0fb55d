"""The 2D network with the published weights, against the implementation that they come from."""

import pytest
import torch

from medi3d import torchvision_shim
from medi3d.datasets.clips.frames import read_frames
from medi3d.weights.catalogue import find_weights, get_row
from medi3d.weights.files import read_tensors
from medi3d.weights.load import load_weights

torchvision_shim.install()
import timm  # noqa: E402 - timm needs the shim

NAME = "imagenet/efficientnet-lite0"


@pytest.fixture
def reference(weights):
    """The authors' network with their weights, from the package efficientnet-lite-pytorch."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(read_tensors(find_weights(get_row(NAME))))
    return network.eval()


@pytest.fixture
def pictures(shared):
    """Two natural pictures as the row's contract has them, `(2, 3, 224, 224)`."""
    contract = get_row(NAME).contract
    frames = read_frames(shared / "misc_videos" / "mmaction2__part_0.mp4", side=contract.size)[:, [0, 31]]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (contract.mean, contract.std))
    return (frames.permute(1, 0, 2, 3)[..., :224, :224] / 255 - mean) / std


@torch.no_grad()
def test_logits_agree_with_the_reference(reference, pictures):
    network = timm.create_model("tf_efficientnet_lite0").eval()
    report = load_weights(network, NAME)
    expected = reference(pictures)
    assert report.fraction == 1
    assert report.dropped == []
    assert (network(pictures) - expected).norm() / expected.norm() < 1e-5


def test_all_published_tensors_have_a_place(weights):
    network = timm.create_model("tf_efficientnet_lite0")
    report = load_weights(network, NAME)
    counters = sum("num_batches_tracked" in key for key in network.state_dict())
    assert len(report.matched) + counters == 296


@torch.no_grad()
def test_the_encoder_takes_all_but_the_head(reference, pictures):
    network = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    report = load_weights(network, NAME)
    assert report.fresh == []
    assert {key.split(".")[0] for key in report.dropped} == {"_conv_head", "_bn1", "_fc"}
    expected = []
    for block in reference._blocks:
        block.register_forward_hook(lambda module, inputs, output: expected.append(output))
    reference(pictures)
    torch.testing.assert_close(network(pictures)[-1], expected[-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_contract_is_the_one_that_the_stored_statistics_were_taken_with(weights, pictures):
    network = timm.create_model("tf_efficientnet_lite0").eval()
    load_weights(network, NAME)
    norm = network.bn1
    alive = norm.running_var > 1e-4

    def distance(images):
        variance = network.conv_stem(images).var(dim=(0, 2, 3))
        return (variance / norm.running_var)[alive].log().median().abs()

    imagenet_std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert distance(pictures) < distance(pictures * 0.5 / imagenet_std)
