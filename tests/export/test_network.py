"""Exported networks answer as the network does, and what cannot be exported is refused."""

import json

import onnxruntime
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from medi3d.cli.entry import app
from medi3d.errors import InexactError, SourceError, WeightsError
from medi3d.export import network as export
from medi3d.export.network import export_network
from medi3d.inflation import inflate
from medi3d.models.artifact import save_artifact
from medi3d.models.contract import Normaliser
from medi3d.models.encoders import create_encoder
from medi3d.models.networks import create_classifier, create_segmenter
from medi3d.weights.rows import InputContract

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own exporters


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.pool = nn.MaxPool2d(2)
        self.deep = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))

    def forward(self, x):
        x = self.stem(x)
        return [x, self.deep(self.pool(x))]


def encoder(profile="mean"):
    encoder = inflate(Small(), profile=profile)
    contract = InputContract((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    encoder.in_channels, encoder.normaliser = 1, Normaliser(contract, 1)
    return encoder


NETWORKS = {
    "encoder": encoder,
    "factorised": lambda: encoder("factorised"),
    "acs": lambda: encoder("acs"),
    "segmenter": lambda: create_segmenter(encoder(), num_classes=3, norm="group"),
    "subpixel": lambda: create_segmenter(encoder(), num_classes=3, norm="group", head="subpixel"),
    "classifier": lambda: create_classifier(encoder(), num_classes=3),
}


def listed(output):
    return [output] if isinstance(output, torch.Tensor) else output


def run_onnx(path, volume):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: volume.numpy()})


def run_file(path, to, volume):
    if to == "onnx":
        return run_onnx(path, volume)
    return torch.jit.load(path)(volume) if to == "torchscript" else torch.export.load(path).module()(volume)


@pytest.mark.parametrize("to", ["onnx", "torch", "torchscript"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_exported_network_answers_as_the_network(kind, to, tmp_path):
    network, path = NETWORKS[kind](), tmp_path / f"net{export.SUFFIX[to]}"
    report = export_network(network, path, to=to, size=(8, 16, 12))
    assert report.max_rel_error <= 1e-4
    for batch in (1, 2) if report.any_batch else (1,):
        volume = torch.rand(batch, 1, 8, 16, 12)
        expected = network.eval()(volume)
        for a, b in zip(listed(run_file(path, to, volume)), listed(expected), strict=True):
            torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-4, atol=1e-4)
    assert report.any_batch
    with pytest.raises(Exception, match=r"(?i)16|dimension"):
        run_file(path, to, torch.rand(1, 1, 8, 20, 12))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("kind", "any_size"),
    [("encoder", True), ("factorised", True), ("segmenter", False)],  # it must fill what the 2×2 pool drops
    ids=["encoder", "factorised", "segmenter"],
)
def test_dynamic_export_takes_other_sizes(kind, any_size, to, tmp_path):
    network, path = NETWORKS[kind](), tmp_path / f"net{export.SUFFIX[to]}"
    report = export_network(network, path, to=to, size=(8, 16, 12), dynamic=True)
    assert report.any_size == any_size
    for size in [(16, 24, 20), (7, 19, 13), (5, 8, 33)] if any_size else [(16, 24, 20)]:
        volume = torch.rand(1, 1, *size)
        found = run_onnx(path, volume) if to == "onnx" else torch.export.load(path).module()(volume)
        for a, b in zip(listed(found), listed(network(volume)), strict=True):
            torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-4, atol=1e-4)


class Padded(nn.Module):
    """Its padding is a number that depends on the size: a trace keeps that of its example."""

    in_channels, strides = 1, [(2, 2, 2)]

    def forward(self, volume):
        fill = [-int(size) % 6 for size in reversed(volume.shape[2:])]
        return nn.functional.pad(volume, [n for size in fill for n in (0, size)]).sum((2, 3, 4)) * fill[0]


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_dynamic_torchscript_is_right_at_other_sizes_or_refuses_them(kind, tmp_path):
    network, path = NETWORKS[kind](), tmp_path / "net.pt"
    export_network(network, path, to="torchscript", size=(4, 8, 8), dynamic=True)
    exported, seen = torch.jit.load(path), []
    for size in [(4, 8, 8), (8, 16, 24), (12, 8, 20), (5, 9, 11), (7, 8, 8), (2, 8, 8), (4, 8, 7)]:
        volume = torch.rand(2, 1, *size)
        try:
            found = exported(volume)
        except torch.jit.Error as error:
            line = str(error).strip().splitlines()[-1]
            assert f"not {size[0]}, {size[1]}, {size[2]}" in line
            continue
        seen.append(size)
        for a, b in zip(listed(found), listed(network(volume)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert {(4, 8, 8), (8, 16, 24)} <= set(seen)


def test_a_trace_that_is_wrong_at_other_sizes_takes_its_own_alone(tmp_path):
    path, network = tmp_path / "net.pt", Padded()
    with pytest.raises(SourceError, match="TorchScript fixes Padded to one size: leave out --dynamic"):
        export_network(network, path, to="torchscript", size=(4, 4, 4), dynamic=True)
    export_network(network, path, to="torchscript", size=(4, 4, 4))
    exported = torch.jit.load(path)
    volume = torch.rand(1, 1, 4, 4, 4)
    torch.testing.assert_close(exported(volume), network(volume))
    with pytest.raises(torch.jit.Error, match="this network was exported for 4, 4, 4 voxels"):
        exported(torch.rand(1, 1, 6, 4, 4))


@pytest.mark.parametrize("to", ["onnx", "torch", "torchscript"])
def test_an_export_carries_the_licences_of_its_weights(to, tmp_path):
    network, path = encoder(), tmp_path / f"net{export.SUFFIX[to]}"
    network.report.weights = {"licences": ["hf:org/a@1/b: mit", "file:c: unknown"]}
    report = export_network(create_segmenter(network, num_classes=2), path, to=to, size=(4, 8, 8))
    extra = {export.LICENCES: ""}
    if to == "onnx":
        extra = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    elif to == "torch":
        torch.export.load(path, extra_files=extra)
    else:
        torch.jit.load(path, _extra_files=extra)
    assert json.loads(extra[export.LICENCES]) == report.licences == network.report.weights["licences"]


class Stubborn(nn.Module):
    in_channels = 1

    def forward(self, volume):
        return volume * float(volume.max())  # a number that no graph holds


class Forgetful(nn.Module):
    in_channels = 1

    def forward(self, volume):
        return volume * (1.0 if torch.compiler.is_compiling() else 1.001)


def test_refusals(tmp_path):
    with pytest.raises(SourceError, match=r"cannot export Stubborn at .* to torch"):
        export_network(Stubborn(), tmp_path / "a.pt2", to="torch", size=(2, 2, 2))
    with pytest.raises(InexactError, match=r"a.pt2 differs from the network by 0.001"):
        export_network(Forgetful(), tmp_path / "a.pt2", to="torch", size=(2, 2, 2))
    with pytest.raises(WeightsError, match=r"is a .onnx file, not 'a.pt2'"):
        export_network(Stubborn(), tmp_path / "a.pt2", to="onnx", size=(2, 2, 2))
    with pytest.raises(SourceError, match="cannot export to 'tflite': use onnx, torch, torchscript"):
        export_network(Stubborn(), tmp_path / "a.tflite", to="tflite", size=(2, 2, 2))
    assert list(tmp_path.iterdir()) == []


def test_command_exports_an_artifact(tmp_path):
    artifact = save_artifact(create_encoder("timm:resnet18", levels=1), tmp_path / "encoder.safetensors")
    out = tmp_path / "encoder.pt2"
    options = ["export", str(artifact), "--to", "torch", "--out", str(out), "--size"]
    answer = CliRunner().invoke(app, [*options, "4,16,16"])
    assert answer.exit_code == 0, answer.output
    assert "inputs of (B, 1, 4, 16, 16) only" in answer.output
    assert torch.export.load(out).module()(torch.rand(1, 1, 4, 16, 16))[0].shape == (1, 64, 2, 8, 8)
    assert CliRunner().invoke(app, [*options, "4,x"]).exit_code == 2
