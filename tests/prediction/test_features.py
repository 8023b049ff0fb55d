"""Features: equal to what the layer gives, of clips and of volumes, and never of another axis or layer."""

import re

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from medi3d.errors import ShapeError, SourceError
from medi3d.models.artifact import save_artifact
from medi3d.models.encoders import create_encoder
from medi3d.models.end_points import EndPoint, end_point, features_at
from medi3d.models.networks import create_classifier, create_segmenter


@pytest.fixture(scope="module")
def encoder():
    return create_encoder("timm:test_resnet", in_channels=1, levels=3).eval()


@pytest.fixture(scope="module")
def artifact(encoder, tmp_path_factory):
    return save_artifact(encoder, tmp_path_factory.mktemp("artifact") / "net.safetensors")


@pytest.fixture
def volume(tmp_path):
    values = np.random.default_rng(0).normal(size=(20, 24, 16)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


@pytest.mark.parametrize("level", [1, 2, 3])
def test_levels_are_the_encoders_maps(encoder, level):
    image = torch.randn(1, 1, 8, 32, 40)
    expected = encoder(image)[level - 1]
    assert torch.equal(features_at(encoder, end_point(encoder, f"level{level}"), image), expected)


def test_a_layer_is_unfolded_and_kept_from_what_works_in_place_behind_it():
    network = create_encoder("inception_v1", levels=1, plan="video", proof=False).eval()
    image = torch.randn(1, 1, 8, 32, 32)
    before = features_at(network, end_point(network, "bn"), image)
    assert before.min() < 0  # the ReLU behind it would have taken these away
    after = features_at(network, end_point(network, "Conv3d_1a_7x7"), image)
    assert torch.equal(before.relu(), after)
    assert torch.equal(after, network(image)[0])


@pytest.mark.parametrize("build", [create_classifier, create_segmenter])
def test_heads_leave_the_encoders_names(encoder, build):
    network = build(encoder, num_classes=2).eval()
    image = torch.randn(1, 1, 8, 32, 32)
    expected = features_at(encoder, end_point(encoder, "layer2"), image)
    assert torch.equal(features_at(network, end_point(network, "layer2"), image), expected)


def test_windows_of_time_follow_one_after_another():
    network = create_classifier("two_stream", num_classes=2).eval()
    clip = torch.randn(1, 5, 20, 32, 32)
    place = EndPoint("rgb.encoder.network.Conv3d_1a_7x7")
    apart = [features_at(network, place, part) for part in clip.split(10, dim=2)]
    assert torch.equal(features_at(network, place, clip), torch.cat(apart, dim=2))


@pytest.mark.parametrize(
    ("name", "message"),
    [("layer9", "no end point 'layer9'; near: .*layer2"), ("nothing_like", "near: level1, level2, level3")],
)
def test_an_unknown_end_point_lists_near_ones(encoder, name, message):
    with pytest.raises(SourceError, match=message):
        end_point(encoder, name)


def test_an_end_point_of_both_streams_is_asked_back():
    network = create_classifier("two_stream", num_classes=2)
    with pytest.raises(SourceError, match=r"matches 2 layers: use rgb\.encoder\.network\.Mixed_5c or flow"):
        end_point(network, "Mixed_5c")


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 4, 1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.relu(x))


@pytest.mark.parametrize(
    ("layer", "place", "message"),
    [
        (ChannelsLast(), "0", "not its last axes"),
        (nn.Flatten(2), "0", "not a map"),
        (Twice(), "0.relu", "runs 2 times"),
    ],
    ids=["channels last", "tokens", "twice"],
)
def test_what_is_no_map_of_the_image_is_refused(layer, place, message):
    with pytest.raises(ShapeError, match=message):
        features_at(nn.Sequential(layer), EndPoint(place), torch.zeros(1, 64, 4, 16, 16))


def test_volumes_give_a_file_each_with_units(medi3d, artifact, volume, tmp_path):
    code, out, err = medi3d(
        "features", volume, "--network", artifact, "--at", "level2", "--out", tmp_path / "out"
    )
    assert (code, err) == (0, "")
    with np.load(tmp_path / "out" / "scan.npz") as kept:
        assert kept["features"].dtype == np.float32
        assert kept["features"].shape == (32, 4, 6, 5)
        assert kept["input_shape"].tolist() == [1, 16, 24, 20]
        assert kept["spacing"].tolist() == [2.0, 1.0, 1.0]
        assert str(kept["end_point"]) == "level2"
        whole = kept["features"]
    assert str(tmp_path / "out" / "scan.npz") in out
    medi3d("features", volume, "--network", artifact, "--at", "level2", "--pooled", "--out", tmp_path / "p")
    with np.load(tmp_path / "p" / "scan.npz") as kept:
        assert np.allclose(kept["features"], whole.mean(axis=(1, 2, 3)), atol=1e-5)


def test_a_damaged_input_does_not_stop_the_others(medi3d, artifact, volume, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"")
    code, _, err = medi3d(
        *("features", tmp_path / "bad.nii.gz", volume, "--network", artifact, "--at", "level1"),
        *("--out", tmp_path / "out"),
    )
    assert code == 1
    assert err.startswith("medi3d: ")
    assert len(err.splitlines()) == 1
    assert (tmp_path / "out" / "scan.npz").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "{artifact}", "--weights", "timm"], "leave out --weights"),
        ([], "no network given"),
        (["--network", "{artifact}", "--at", "layer7"], "no end point 'layer7'"),
        (["--network", "timm:nothing"], "timm has no model"),
        (["--weights", "kinetics400/i3d-rgb+kinetics400/i3d-rgb"], "two streams must be RGB\\+FLOW"),
    ],
    ids=["weights of an artifact", "no network", "end point", "source", "streams"],
)
def test_what_cannot_be_ends_in_one_line(medi3d, artifact, volume, tmp_path, arguments, message):
    given = [argument.format(artifact=artifact) for argument in arguments]
    at = [] if "--at" in given else ["--at", "level1"]
    code, _, err = medi3d("features", volume, *given, *at, "--out", tmp_path / "out")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert re.search(message, err)
