from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medi3d.errors import WeightsError
from medi3d.inflation import KernelPlan, adapt_channels, inflate, inflate_kernel
from medi3d.inflation.network import build
from medi3d.models.inception import InceptionV1, InceptionV1Classifier
from medi3d.weights.keymaps import KeyMap, get_keymap
from medi3d.weights.load import load_weights


def small_network(in_channels=3, classes=2):
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(in_channels, 4, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(4),
            head=nn.Conv2d(4, classes, 1),
        )
    )


@pytest.fixture
def published(tmp_path):
    """Save tensors, by default those of another small network, and give the path and the tensors."""

    def write(tensors=None, **changes):
        tensors = {**(small_network().state_dict() if tensors is None else tensors), **changes}
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}
        save_file(tensors, tmp_path / "published.safetensors")
        return tmp_path / "published.safetensors", tensors

    return write


def test_all_tensors_are_copied_and_counted(published):
    path, tensors = published()
    network = small_network()
    report = load_weights(network, path)
    torch.testing.assert_close(network.state_dict(), tensors)
    assert report.counts == {"matched": 7, "inflated": 0, "adapted": 0, "fresh": 0, "dropped": 0}
    assert report.fraction == 1
    assert report.to_dict()["counts"] == report.counts


@pytest.mark.parametrize("form", ["file:{}", "{}"], ids=["file:", "path"])
def test_a_file_may_be_given_by_path(published, form):
    path, _ = published()
    assert load_weights(small_network(), form.format(path)).weights == f"file:{path}"


@pytest.mark.parametrize("profile", ["mean", "centre", "repeat"])
def test_2d_kernels_are_spread_over_depth_by_the_networks_profile(published, profile):
    path, tensors = published()
    network = inflate(small_network(), profile=profile, allow_inexact=True)
    report = load_weights(network, path)
    expected = inflate_kernel(tensors["stem.weight"], 3, profile)
    torch.testing.assert_close(network.network.stem.weight.data, expected)
    assert (set(report.inflated), len(report.matched)) == ({"stem.weight", "head.weight"}, 5)


def test_loading_after_inflation_equals_inflating_what_is_loaded(published):
    path, _ = published()
    net2d = small_network()
    load_weights(net2d, path)
    before, after = inflate(net2d).eval(), inflate(small_network()).eval()
    load_weights(after, path)
    volume = torch.randn(1, 3, 4, 6, 6)
    torch.testing.assert_close(after(volume), before(volume), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("three_d", [False, True], ids=["2D", "3D"])
def test_rgb_kernels_are_adapted_to_other_input_channels(published, channels, three_d):
    path, tensors = published()
    net2d = small_network(channels)
    network = inflate(net2d) if three_d else net2d
    report = load_weights(network, path)
    stem = adapt_channels(tensors["stem.weight"], channels)
    expected = inflate_kernel(stem, 3) if three_d else stem
    torch.testing.assert_close((network.network if three_d else network).stem.weight.data, expected)
    assert report.adapted == ["stem.weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra.weight": torch.ones(2)}, r"extra\.weight of the file has no place in the network"),
        ({"norm.bias": None}, r"nothing in it fills norm\.bias of the network"),
        ({"norm.bias": torch.ones(5)}, r"norm\.bias is \(5,\) in the file, \(4,\) in the network"),
        (
            {"stem.weight": torch.ones(4, 3, 5, 5)},
            r"stem\.weight is \(4, 3, 5, 5\) in the file, \(4, 3, 3, 3\)",
        ),
        (
            {"head.weight": torch.ones(2, 2, 1, 1)},
            r"head\.weight is \(2, 2, 1, 1\) in the file, \(2, 4, 1, 1\)",
        ),
        ({"stem.weight": torch.ones(4, 3, 3, 3, 3)}, r"stem\.weight is \(4, 3, 3, 3, 3\) in the file"),
    ],
    ids=["extra", "missing", "misshapen", "kernel", "channels", "3D into 2D"],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(published, changes, message):
    path, _ = published(**changes)
    network = small_network()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as refusal:
        load_weights(network, path)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_many_keys_are_named_in_part_and_counted(published):
    path, _ = published({f"extra.{i}": torch.ones(1) for i in range(10)})
    with pytest.raises(WeightsError, match=r"extra\.0, .* and 6 more of the file"):
        load_weights(small_network(), path)


@pytest.mark.parametrize(
    "changes", [{"head.weight": None, "head.bias": None}, {}], ids=["missing", "other classes"]
)
def test_a_part_that_is_expected_missing_stays_fresh(published, changes):
    path, _ = published(**changes)
    network = small_network(classes=5)
    head = network.head.weight.clone()
    report = load_weights(network, path, expect_missing=("head.*",))
    assert report.fresh == ["head.weight", "head.bias"]
    assert report.dropped == ([] if changes else ["head.bias", "head.weight"])
    assert report.fraction == 5 / 7
    assert torch.equal(network.head.weight, head)


def test_a_table_renames_drops_and_turns(published):
    network = small_network()
    ours = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    path, _ = published(
        {f"theirs/{key}": tensor + 1 for key, tensor in ours.items()} | {"step": torch.ones(1)}
    )
    expected = {key: (tensor + 1) * 2 for key, tensor in ours.items()}
    table = {f"theirs/{key}": key for key in ours} | {"step": None}
    report = load_weights(network, path, keymap=KeyMap(table, lambda key, tensor: tensor * 2))
    torch.testing.assert_close({k: network.state_dict()[k] for k in ours}, expected)
    assert report.dropped == ["step"]


def test_what_a_table_does_not_name_is_refused(published):
    path, _ = published()
    with pytest.raises(WeightsError, match="has no place in the network"):
        load_weights(small_network(), path, keymap=KeyMap({"stem.weight": "stem.weight"}))


@pytest.mark.parametrize(
    ("weights", "message"),
    [("no/such", "unknown weights"), ("file:gone.pth", "no such"), ("timm", "no file here")],
)
def test_weights_that_are_not_there_are_refused(weights, message):
    with pytest.raises(WeightsError, match=message):
        load_weights(small_network(), weights)


def test_i3d_fills_the_published_network_completely(weights):
    network, _ = build(InceptionV1Classifier(), KernelPlan.video())
    report = load_weights(network, "kinetics400/i3d-rgb")
    filled = {key: network.network.state_dict()[key] for key in report.matched}
    assert (len(filled), sum(t.numel() for t in filled.values())) == (230, 12_704_544)
    assert report.fraction == 1


def test_i3d_fills_the_medical_variant_for_one_channel_and_small_volumes(weights):
    network, _ = build(
        InceptionV1(("Conv3d_1a_7x7", "Mixed_3c"), stem_stride=1), KernelPlan.isotropic(), in_channels=1
    )
    report = load_weights(network, "kinetics400/i3d-rgb")
    assert (report.adapted, report.fresh, report.fraction) == (["Conv3d_1a_7x7.conv.weight"], [], 1)
    assert {key.split("/")[1] for key in report.dropped} >= {"Mixed_4b", "Mixed_5c", "Logits"}


def test_i3d_with_another_head_must_be_asked_for(weights):
    network, _ = build(InceptionV1Classifier(8), KernelPlan.video())
    with pytest.raises(
        WeightsError, match=r"Logits.Conv3d_0c_1x1.weight is \(400, 1024, 1, 1, 1\) in the file"
    ):
        load_weights(network, "kinetics400/i3d-rgb")
    report = load_weights(network, "kinetics400/i3d-rgb", expect_missing=("Logits.*",))
    assert report.fresh == ["Logits.Conv3d_0c_1x1.weight", "Logits.Conv3d_0c_1x1.bias"]


@pytest.fixture(params=["pytorch_i3d", "kinetics_i3d_pytorch"])
def port(request):
    """A key map of a PyTorch port, and tensors under its names: those of a network of ours, scales of one."""
    ours, keymap = InceptionV1Classifier().state_dict(), get_keymap(request.param)
    norm = keymap.ones[0].split(".")[1]
    tensors = {name: ours[key].clone() for name, key in keymap.table.items()}
    tensors |= {
        n.replace("running_var", "weight"): torch.ones_like(t) for n, t in tensors.items() if norm in n
    }
    tensors |= {n: torch.rand_like(t) for n, t in tensors.items() if n.endswith(f"{norm}.bias")}
    return request.param, tensors


def test_weights_of_the_pytorch_ports_fill_i3d(published, port):
    name, tensors = port
    network = InceptionV1Classifier()
    report = load_weights(network, published(tensors)[0], keymap=name)
    assert (len(report.matched), len(report.dropped), report.fraction) == (230, 57, 1)
    ours = network.state_dict()
    assert all(torch.equal(ours[key], tensors[n]) for n, key in get_keymap(name).table.items())


def test_a_trained_scale_of_a_port_is_not_lost_in_silence(published, port):
    name, tensors = port
    scale = next(key for key in tensors if key.endswith(".weight") and "conv3d.weight" not in key)
    tensors[scale][0] = 1.5
    with pytest.raises(WeightsError, match="of the file must be 1: the norms here have no scale"):
        load_weights(InceptionV1Classifier(), published(tensors)[0], keymap=name)
