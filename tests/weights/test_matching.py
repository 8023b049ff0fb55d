"""Names of files find those of the network, by one rule, and what has no place is an error."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from medi3d.errors import WeightsError
from medi3d.models.sources import build_source, whole_network
from medi3d.models.volumetric import create_volumetric
from medi3d.weights import matching
from medi3d.weights.keymaps import KeyMap
from medi3d.weights.load import load_weights


class Backbone(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3)
        self.layer1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)))


OURS = {name: tensor + 1 for name, tensor in Backbone().state_dict().items()}
OTHER = {name: tensor * 0 for name, tensor in OURS.items()}
FC = {"fc.weight": torch.ones(10, 4), "fc.bias": torch.ones(10)}


def prefixed(prefix, tensors=OURS):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def load(tmp_path, content, module, part="", **options):
    torch.save(content, tmp_path / "w.pth")
    return load_weights(module, f"file:{tmp_path / 'w.pth'}{part and '#' + part}", **options)


KINDS = {
    "with its classifier": ({**OURS, **FC}, 2),
    "lightning": ({"state_dict": prefixed("model.", {**OURS, **FC})}, 2),
    "lightning and a loss": ({"state_dict": {**prefixed("net."), "criterion.weight": torch.ones(3)}}, 1),
    "lightning, ddp, compiled": ({"state_dict": prefixed("module.model._orig_mod.")}, 0),
    "hugging face": (prefixed("resnet."), 0),
    "moco": (
        {
            "state_dict": {
                **prefixed("module.encoder_k.", OTHER),
                **prefixed("module.encoder_q.", {**OURS, **FC}),
                "module.queue": torch.ones(4, 8),
            }
        },
        len(OURS) + 3,
    ),
    "dino": (
        {"teacher": {**prefixed("backbone."), "head.last.weight": torch.ones(8, 4)}, "student": OTHER},
        1,
    ),
    "teacher and student in one": ({**prefixed("student.", OTHER), **prefixed("teacher.")}, len(OURS)),
    "an encoder of two": ({**prefixed("encoder."), "decoder.up.weight": torch.ones(4, 4, 2, 2)}, 1),
    "flattened": ({name.replace("layer1.", "layer1_"): tensor for name, tensor in OURS.items()}, 0),
}


@pytest.mark.parametrize(("content", "left_out"), KINDS.values(), ids=KINDS.keys())
def test_every_tensor_finds_its_place_and_what_is_left_out_is_reported(tmp_path, content, left_out):
    network = Backbone()
    report = load(tmp_path, content, network)
    torch.testing.assert_close(dict(network.state_dict()), OURS)
    assert (report.fraction, len(report.dropped)) == (1, left_out)
    assert not any("key map" in note for note in report.notes)
    assert bool(left_out) == any("left out" in note for note in report.notes)


REFUSED = {
    "two copies": (
        {**prefixed("left."), **prefixed("right.", OTHER)},
        r"has the network 2 times, under left., right.: choose with file:PATH#left",
    ),
    "another layer": (
        {**OURS, "layer2.conv.weight": torch.ones(4, 4, 3, 3)},
        r"layer2\.conv\.weight of",
    ),
    "a neck": ({**OURS, "neck.weight": torch.ones(4, 4)}, r"neck\.weight of the file has no place"),
    "a head of 3×3": (
        {**OURS, "head.conv.weight": torch.ones(2, 4, 3, 3)},
        r"head\.conv\.weight of",
    ),
    "another spelling": (
        {("conv_1.weight" if name == "conv1.weight" else name): t for name, t in OURS.items()},
        r"conv_1\.weight of the file has no place in the network; nearest name: conv1\.weight",
    ),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_place_is_refused_and_nothing_is_changed(tmp_path, content, message):
    network = Backbone()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as refusal:
        load(tmp_path, content, network)
    assert "\n" not in str(refusal.value)
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


def test_one_of_two_copies_can_be_chosen(tmp_path):
    network = Backbone()
    load(tmp_path, REFUSED["two copies"][0], network, part="right")
    torch.testing.assert_close(dict(network.state_dict()), OTHER)


@pytest.mark.parametrize("theirs", [1, 2, 3, 4])
@pytest.mark.parametrize("ours", [1, 2, 3, 4])
def test_stems_adapt_and_grey_images_give_the_same(tmp_path, theirs, ours):
    published, network = Backbone(theirs), Backbone(ours)
    report = load(tmp_path, published.state_dict(), network)
    grey = torch.rand(1, 1, 8, 8)
    found, expected = (
        net.conv1(grey.expand(-1, n, -1, -1)) for net, n in ((network, ours), (published, theirs))
    )
    torch.testing.assert_close(found, expected)
    assert report.adapted == ([] if theirs == ours else ["conv1.weight"])


def test_a_stem_is_kept_as_published_where_that_is_asked_for(tmp_path):
    published, network = Backbone(4), Backbone(3)
    report = load(tmp_path, published.state_dict(), network, keep_stem=True)
    image = torch.rand(1, 4, 8, 8)
    torch.testing.assert_close(network.conv1(image), published.conv1(image))
    assert (network.conv1.in_channels, report.adapted) == (4, [])


NETWORKS = ["convnext_atto", "vit_tiny_patch16_224", "densenet121", "efficientnet_lite0", "resnet10t"]


@pytest.mark.parametrize("name", NETWORKS)
def test_files_of_timm_fill_its_encoders(tmp_path, name):
    source, published = f"timm:{name}", timm.create_model(name)
    encoder = build_source(source, levels=2)
    report = load(tmp_path, published.state_dict(), encoder, whole=lambda: whole_network(source))
    theirs = {key.replace(".", "_"): tensor for key, tensor in published.state_dict().items()}
    ours = {key.removeprefix("model.").replace(".", "_"): t for key, t in encoder.state_dict().items()}
    torch.testing.assert_close(ours, {key: theirs[key] for key in ours})
    assert report.fraction == 1
    assert any("behind the encoder" in note for note in report.notes)
    assert not any("key map" in note for note in report.notes)


def test_position_embeddings_are_brought_to_the_network_as_timm_does(tmp_path):
    published = timm.create_model("vit_tiny_patch16_224", img_size=96)
    expected = timm.create_model("vit_tiny_patch16_224")
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(published.state_dict(), expected)
    encoder = build_source("timm:vit_tiny_patch16_224")
    load(
        tmp_path,
        {"model": published.state_dict()},
        encoder,
        whole=lambda: whole_network("timm:vit_tiny_patch16_224"),
    )
    torch.testing.assert_close(encoder.model.pos_embed.data, filtered["pos_embed"])
    torch.testing.assert_close(encoder.model.blocks[3].attn.qkv.weight, published.blocks[3].attn.qkv.weight)


def test_an_nnunet_file_finds_its_key_map(tmp_path):
    encoder = create_volumetric("nnunet3d:plain", levels=2)
    state = {f"encoder.{name}": tensor + 1 for name, tensor in encoder.state_dict().items()}
    copies = {k.replace(".conv.", ".all_modules.0."): t for k, t in state.items() if ".conv." in k}
    decoder = {f"decoder.{k}": t for k, t in state.items()} | {
        "decoder.seg_layers.0.weight": torch.ones(2, 4, 1, 1, 1)
    }
    report = load(tmp_path, {"network_weights": {**state, **copies, **decoder}, "init_args": {}}, encoder)
    torch.testing.assert_close({f"encoder.{k}": t for k, t in encoder.state_dict().items()}, state)
    assert any("key map nnunet" in note for note in report.notes)


TABLE = {f"theirs.{name}": name for name in OURS if "num_batches" not in name}


def first_axis(key, tensor):
    return tensor.flip(0)


def last_axis(key, tensor):
    return tensor.flip(-1)


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        ({"a": KeyMap(TABLE), "b": KeyMap(TABLE, dropped=("*",))}, "key map a"),
        (
            {"turned": KeyMap(TABLE, last_axis), "plain": KeyMap(TABLE)},
            "but turn the kernels",
        ),
        (
            {
                "left": KeyMap(TABLE, last_axis),
                "right": KeyMap(TABLE, first_axis),
            },
            "several key maps fit the file: left, right; name one",
        ),
    ],
    ids=["the same", "one as published", "both turned"],
)
def test_of_several_key_maps_one_that_turns_nothing_is_taken_or_none(tmp_path, monkeypatch, maps, expected):
    monkeypatch.setattr(matching, "KEYMAPS", maps)
    monkeypatch.setattr(matching, "get_keymap", lambda name: maps[name])
    network, content = Backbone(), {theirs: OURS[ours] for theirs, ours in TABLE.items()}
    if "several" in expected:
        with pytest.raises(WeightsError, match=expected):
            load(tmp_path, content, network)
        return
    report = load(tmp_path, content, network)
    assert any(expected in note for note in report.notes)
    assert all(torch.equal(network.state_dict()[ours], OURS[ours]) for ours in TABLE.values())
