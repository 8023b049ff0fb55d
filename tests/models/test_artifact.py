"""Artifacts: what is written comes back bit for bit, proven; anything else is refused in one line."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from medi3d.errors import SourceError, WeightsError
from medi3d.inflation import KernelPlan
from medi3d.models import artifact
from medi3d.models import sources as registry
from medi3d.models.artifact import load_artifact, read_description, save_artifact
from medi3d.models.encoders import create_encoder


class Tiny(nn.Module):
    """Convolution, norm, pool, convolution: two maps."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.pool, self.deep = nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return [x, self.deep(self.pool(x))]


@pytest.fixture(autouse=True)
def tiny_source(monkeypatch):
    monkeypatch.setattr(registry, "_SOURCES", dict(registry._SOURCES))
    registry.register_source("tiny", "for these tests")(lambda levels: Tiny())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def encoder():
    return create_encoder("tiny", in_channels=2)


OPTIONS = {
    "isotropic": {},
    "centre": {"profile": "centre"},
    "planar": {"plan": "planar"},
    "video": {"plan": "video"},
    "four channels": {"in_channels": 4},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_what_is_written_comes_back_bit_for_bit(path, options):
    encoder = create_encoder("tiny", **options).eval()
    again = load_artifact(save_artifact(encoder, path)).eval()
    volume = torch.randn(2, encoder.in_channels, 7, 12, 10)
    for expected, found in zip(encoder(volume), again(volume), strict=True):
        assert torch.equal(expected, found)
    assert again.report.exactness.exact
    assert (again.plan, again.profile, again.strides) == (encoder.plan, encoder.profile, encoder.strides)


@torch.no_grad()
def test_trained_weights_and_statistics_come_back(path, encoder):
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    with torch.enable_grad():
        sum(x.square().mean() for x in encoder.train()(torch.randn(2, 2, 4, 8, 8))).backward()
    optimizer.step()
    again = load_artifact(save_artifact(encoder, path))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert again.report.exactness.exact  # any taps are the inflation of their sum


def test_a_timm_network_with_fewer_levels_comes_back(path):
    encoder = create_encoder("timm:test_resnet", levels=2)
    again = load_artifact(save_artifact(encoder, path))
    assert again.out_channels == encoder.out_channels
    assert again.report.exactness.exact


@pytest.mark.parametrize("levels", [None, 2], ids=["all levels", "two"])
def test_a_transformer_with_attention_over_depth_comes_back(path, levels):
    """timm gives the last maps of a transformer: the first of them are not those of its first blocks."""
    plan = KernelPlan("mine", kernel=1, stride=1, attention="all", attention_form="divided")
    encoder = create_encoder("timm:test_vit", levels=levels, plan=plan)
    again = load_artifact(save_artifact(encoder, path))
    assert again.report.plan == plan
    assert again.report.exactness.exact
    assert again.report.exactness.can_mix_depth
    with torch.no_grad():
        again.network.model.blocks[0].temporal_fc.weight.normal_()
    trained = load_artifact(save_artifact(again, path))
    assert trained.report.exact_on == "never"
    assert not trained.report.exactness.exact


def test_the_description_says_all_that_is_known(path, encoder):
    description = read_description(save_artifact(encoder, path))
    assert description["source"] == "tiny"
    assert description["plan"] == encoder.plan.to_dict()
    assert (description["profile"], description["in_channels"]) == ("mean", 2)
    assert description["encoder_levels"] == 2
    assert description["weights"] == {"name": "none", "licences": []}
    assert description["max_rel_error"] <= 1e-9
    assert set(description["versions"]) == {"medi3d", "torch", "timm"}
    assert len(description["sha256"]) == 64


def test_create_encoder_takes_an_artifact(path, encoder):
    save_artifact(encoder, path)
    again = create_encoder(str(path), in_channels=2)
    assert torch.equal(again.network.stem.weight, encoder.network.stem.weight)
    for options, message in [
        ({"in_channels": 2, "weights": "timm"}, "has its own weights"),
        ({"in_channels": 1}, "takes 2 channels, not 1"),
        ({"in_channels": 2, "levels": 1}, "has 2 levels, not 1"),
        ({"in_channels": 2, "plan": "planar"}, "has the plan 'isotropic', not 'planar'"),
        ({"in_channels": 2, "profile": "centre"}, "has the profile 'mean', not 'centre'"),
    ]:
        with pytest.raises(SourceError, match=message):
            create_encoder(str(path), **options)


def rewritten(path, change):
    """The file again, with `change` made to its tensors and description."""
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["medi3d"])
    tensors = load_file(path)
    change(tensors, description)
    save_file(tensors, path, metadata={"medi3d": json.dumps(description)})


def flip(tensors, description):
    tensors["stem.weight"].view(-1)[3] += 1e-6


def misfit(tensors, description):
    tensors["deep.weight"] = tensors["deep.weight"][:, :, :1].contiguous()
    description["sha256"] = artifact._fingerprint(tensors)


def lacking(tensors, description):
    del tensors["norm.bias"]
    description["sha256"] = artifact._fingerprint(tensors)


CHANGES = {
    "one number": (flip, WeightsError, "is damaged: its tensors are not those that were written"),
    "another shape": (misfit, WeightsError, "does not fit tiny: 1 tensors .* such as 'deep.weight'"),
    "a tensor less": (lacking, WeightsError, "does not fit tiny: 1 tensors .* such as 'norm.bias'"),
    "another format": (lambda t, d: d.update(format="other"), WeightsError, "is not an artifact of medi3d"),
    "no plan": (lambda t, d: d.pop("plan"), WeightsError, "lacks plan"),
    "no checksum": (lambda t, d: d.pop("sha256"), WeightsError, "lacks sha256"),
    "unknown source": (
        lambda t, d: d.update(source="tyni"),
        SourceError,
        "unknown source 'tyni'.*near: tiny",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), CHANGES.values(), ids=CHANGES)
def test_a_changed_file_is_refused(path, encoder, change, error, message):
    rewritten(save_artifact(encoder, path), change)
    with pytest.raises(error, match=message) as refusal:
        load_artifact(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99], ids=lambda s: f"{s:.0%}")
def test_a_truncated_file_is_refused(path, encoder, share):
    content = save_artifact(encoder, path).read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match="cannot read the artifact") as refusal:
        load_artifact(path)
    assert "\n" not in str(refusal.value)


def test_what_is_no_artifact_is_refused(tmp_path, path):
    with pytest.raises(WeightsError, match="no artifact at"):
        load_artifact(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match="is not an artifact of medi3d"):
        read_description(path)
    with pytest.raises(WeightsError, match="no artifact at"):
        load_artifact(tmp_path)


def test_another_suffix_is_refused(tmp_path, encoder):
    with pytest.raises(WeightsError, match=r"is a .safetensors file, not 'tiny.pt'"):
        save_artifact(encoder, tmp_path / "tiny.pt")


def test_a_network_that_no_name_can_build_again_is_refused(path):
    with pytest.raises(SourceError, match="unknown source 'Tiny'"):
        save_artifact(create_encoder(Tiny(), in_channels=3), path)
    assert not path.exists()


def test_a_failure_leaves_nothing_half_written(path, encoder, monkeypatch):
    def fail(tensors, aside, metadata):
        aside.write_bytes(b"half")
        raise OSError("no space left on device")

    save_artifact(encoder, path)
    before = path.read_bytes()
    monkeypatch.setattr(artifact, "save_file", fail)
    with pytest.raises(WeightsError, match=r"cannot write the artifact .*no space left"):
        save_artifact(encoder, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path, encoder):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot write the artifact"):
        save_artifact(encoder, tmp_path / "file" / "tiny.safetensors")


def test_the_known_mistake_is_never_proven(path):
    report = load_artifact(save_artifact(create_encoder("tiny", profile="repeat"), path)).report
    assert not report.exact_by_nature
    assert not report.exactness.exact


def test_the_proof_uses_a_size_that_the_network_takes(path, monkeypatch):
    class Large(Tiny):
        def forward(self, x):
            if x.shape[-1] < 96:
                raise ValueError("too small")
            return super().forward(x)

    registry.register_source("large", "takes no small images")(lambda levels: Large())
    report = load_artifact(save_artifact(create_encoder("large"), path)).report
    assert report.exactness.exact
    assert report.exactness.size == 96
