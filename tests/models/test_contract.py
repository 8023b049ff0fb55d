"""The input contract: data in [-1, 1] reaches the weights as they were trained, borders included."""

import json
import warnings

import pytest
import timm
import torch
from torch import nn

from medi3d.errors import ShapeError
from medi3d.inflation import inflate, verify
from medi3d.models import encoders
from medi3d.models.artifact import load_artifact, read_description, save_artifact
from medi3d.models.contract import InputRangeWarning, Normaliser, timm_contract
from medi3d.models.encoders import create_encoder
from medi3d.models.networks import NetworkSettings, create_network
from medi3d.weights.catalogue import get_row
from medi3d.weights.rows import InputContract

IMAGENET = InputContract((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = get_row("imagenet/efficientnet-lite0").contract
KINETICS = get_row("kinetics400/i3d-rgb").contract


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, image):
        return [self.conv(image)]


def normalised(contract, data):
    """As the weights' own training would: pixels in [0, 1], then mean and std per channel."""
    mean, std = (torch.tensor(v, dtype=data.dtype).view(1, -1, 1, 1) for v in (contract.mean, contract.std))
    return ((data + 1) / 2 - mean) / std


def encoder_with(contract, channels, net=None):
    normaliser = Normaliser(contract, channels)
    encoder = inflate(net or Stem(), in_channels=normaliser.channels).double()
    encoder.in_channels, encoder.normaliser = channels, normaliser.double()
    return encoder


def repeated(image, depth=4):
    return image.unsqueeze(2).repeat(1, 1, depth, 1, 1)


@pytest.mark.parametrize("contract", [IMAGENET, LITE, KINETICS], ids=["imagenet", "lite", "kinetics"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grey_data_gives_what_the_weights_give_for_it_borders_included(contract, channels):
    net = Stem().double()
    grey = torch.rand(2, 1, 11, 12, dtype=torch.float64) * 2 - 1
    found = encoder_with(contract, channels, net)(repeated(grey.expand(-1, channels, -1, -1)))[0]
    expected = net(normalised(contract, grey.expand(-1, 3, -1, -1)))[0]
    torch.testing.assert_close(found, repeated(expected, found.shape[2]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("contract", [IMAGENET, LITE, KINETICS], ids=["imagenet", "lite", "kinetics"])
def test_colour_data_keeps_its_channels(contract):
    net = Stem().double()
    image = torch.rand(2, 3, 11, 12, dtype=torch.float64) * 2 - 1
    found = encoder_with(contract, 3, net)(repeated(image))[0]
    expected = net(normalised(contract, image))[0]
    torch.testing.assert_close(found, repeated(expected, found.shape[2]), rtol=1e-6, atol=1e-6)


def test_each_modality_is_a_grey_image_and_counts_equally():
    net = Stem().double()
    first, second = (torch.rand(2, 1, 11, 12, dtype=torch.float64) * 2 - 1 for _ in range(2))
    found = encoder_with(IMAGENET, 2, net)(repeated(torch.cat([first, second], dim=1)))[0]
    alone = [net(normalised(IMAGENET, x.expand(-1, 3, -1, -1)))[0] for x in (first, second)]
    torch.testing.assert_close(found[:, :, 0], (alone[0] + alone[1]) / 2, rtol=1e-6, atol=1e-6)


def test_channels_are_copied_in_the_order_of_the_weights():
    data = torch.rand(1, 2, 1, 1, 1)
    scaled = Normaliser(IMAGENET, 2)(data).flatten()
    expected = [((x + 1) / 2 - m) / s for x in data.flatten() for m, s in zip(*ORDER, strict=True)]
    torch.testing.assert_close(scaled, torch.stack(expected))


ORDER = (IMAGENET.mean, IMAGENET.std)


@pytest.mark.parametrize(
    ("contract", "channels", "inside"),
    [(IMAGENET, 1, 3), (IMAGENET, 2, 6), (IMAGENET, 3, 3), (LITE, 1, 1), (LITE, 4, 4), (KINETICS, 1, 1)],
)
def test_channels_inside_are_more_only_where_mean_and_std_differ(contract, channels, inside):
    assert Normaliser(contract, channels).channels == inside


def test_weights_trained_on_our_range_see_the_volume_itself():
    volume = torch.rand(1, 1, 3, 4, 5)
    assert Normaliser(KINETICS, 1)(volume) is volume


def test_another_range_of_the_data():
    data = torch.linspace(0, 255, 8).view(1, 1, 2, 2, 2)
    found = Normaliser(KINETICS, 1, data_range=(0, 255))(data)
    torch.testing.assert_close(found, data / 127.5 - 1)


def test_the_proof_is_without_the_normaliser_and_leaves_it_in_place():
    net = Stem()
    encoder = encoder_with(IMAGENET, 1, net)
    assert verify(net, encoder).exact
    assert encoder.normaliser is not None
    assert encoder(torch.zeros(1, 1, 2, 8, 8, dtype=torch.float64))[0].shape[1] == 4


@pytest.mark.parametrize("training", [True, False], ids=["training", "prediction"])
def test_wrong_range_is_warned_about_once_with_what_was_measured(training):
    normaliser = Normaliser(KINETICS, 1).train(training)
    volume = torch.linspace(-1000, 3000, 8).view(1, 1, 2, 2, 2)
    with pytest.warns(InputRangeWarning, match=r"in \[-1, 1\], but this one is in \[-1000, 3000\]"):
        normaliser(volume)
    for _ in range(8):
        normaliser(volume)  # a warning would be an error here


def test_range_is_watched_after_the_first_input_too_and_augmented_data_is_let_pass():
    normaliser = Normaliser(IMAGENET, 1)
    for _ in range(3):
        normaliser(torch.full((1, 1, 2, 2, 2), 1.9))
    with pytest.warns(InputRangeWarning, match=r"\[200, 200\]"):
        normaliser(torch.full((1, 1, 2, 2, 2), 200.0))


@pytest.fixture
def timm_weights(monkeypatch):
    """timm's weights stand in for themselves: random ones, as if they had been downloaded."""
    build = encoders.build_source
    monkeypatch.setattr(encoders, "build_source", lambda source, **options: build(source, levels=2))


def test_timm_weights_bring_their_contract_and_an_artifact_keeps_it(timm_weights, tmp_path):
    encoder = create_encoder("timm:resnet18", weights="timm", levels=2).eval()
    assert encoder.in_channels == 1
    assert encoder.network.conv1.weight.shape[1] == 3
    volume = torch.rand(1, 1, 4, 32, 32)
    loaded = load_artifact(save_artifact(encoder, tmp_path / "e.safetensors")).eval()
    torch.testing.assert_close(loaded(volume)[1], encoder(volume)[1])
    assert loaded.report.exactness.exact
    assert json.dumps(encoder.report.to_dict()["weights"]["contract"]["mean"]) == "[0.485, 0.456, 0.406]"


@pytest.mark.parametrize("weights", ["imagenet/efficientnet-lite0", "timm"])
def test_network_for_a_checkpoint_has_the_contract_of_weights_that_are_not_read(monkeypatch, weights):
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", "")
    monkeypatch.setattr(encoders, "load_weights", None)  # to read any would be an error
    settings = NetworkSettings("timm:tf_efficientnet_lite0", weights, levels=2)
    network = create_network(settings, "segmentation", 2, read_weights=False)
    assert network.encoder.normaliser.contract == (
        LITE if weights != "timm" else timm_contract(settings.source)
    )
    assert network.encoder.network.conv_stem.weight.shape[1] == network.encoder.normaliser.channels
    assert network(torch.rand(1, 1, 8, 16, 16)).shape == (1, 2, 8, 16, 16)


def test_contract_can_be_left_out(timm_weights):
    encoder = create_encoder("timm:resnet18", weights="timm", levels=2, contract=False)
    assert encoder.normaliser is None
    with warnings.catch_warnings():
        encoder(torch.full((1, 1, 4, 32, 32), 1e4))


def test_state_dict_is_that_of_the_network_alone(timm_weights):
    encoder = create_encoder("timm:resnet18", weights="timm", levels=2)
    assert all(key.startswith("network.") for key in encoder.state_dict())


def test_what_timm_does_not_say_and_refusals():
    assert timm_contract("timm:resnet18") == IMAGENET
    assert timm_contract("timm:no_such_network") is None
    with pytest.raises(ShapeError, match="0 channels"):
        Normaliser(IMAGENET, 0)
    with pytest.raises(ShapeError, match=r"range \(1, 0\)"):
        Normaliser(IMAGENET, 1, data_range=(1, 0))


@pytest.fixture
def write_file(tmp_path):
    """A file of the network's own weights, under a classifier's names; `channels`: of its first kernel."""

    def write(name="resnet10t", channels=3):
        torch.manual_seed(1)
        network = timm.create_model(name, in_chans=channels)
        torch.save({"state_dict": network.state_dict()}, tmp_path / "checkpoint_best.pth.tar")
        return network, f"file:{tmp_path / 'checkpoint_best.pth.tar'}"

    return write


@pytest.mark.parametrize("read", [True, False], ids=["read", "for a checkpoint"])
def test_a_file_for_a_network_of_timm_takes_its_mean_and_std(write_file, read, caplog):
    name = "resnet10t"
    _, weights = write_file(name)
    encoder = create_encoder(f"timm:{name}", weights=weights, levels=2, read_weights=read, proof=False)
    assert encoder.normaliser.contract == timm_contract(f"timm:{name}")
    (note,) = (line for line in encoder.report.weights["notes"] if "mean" in line)
    assert f"from timm for timm:{name}" in note
    assert note in caplog.messages


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_file_for_other_channels_is_used_as_it_is_and_said_to_be_unknown(write_file, channels, caplog):
    published, weights = write_file(channels=channels)
    encoder = create_encoder("timm:resnet10t", weights=weights, levels=1, in_channels=channels).eval()
    assert encoder.normaliser is None
    assert any("do not say what range, mean and std they expect" in line for line in caplog.messages)
    image = torch.rand(1, channels, 32, 32)
    expected = published.eval().act1(published.bn1(published.conv1(image)))
    torch.testing.assert_close(encoder(repeated(image))[0][:, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_an_artifact_and_what_comes_of_it_carry_the_licences_of_their_weights(timm_weights, tmp_path):
    encoder = create_encoder("timm:resnet18", weights="timm", levels=2)
    licence = "timm:resnet18: apache-2.0"
    assert encoder.report.weights["licences"] == [licence]
    path = save_artifact(encoder, tmp_path / "first.safetensors")
    assert read_description(path)["licences"] == [licence]
    again = create_encoder("timm:resnet18", weights=f"file:{path}", levels=2)
    assert again.report.weights["licences"] == [licence]
    assert again.normaliser.contract == encoder.normaliser.contract
