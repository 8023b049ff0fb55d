"""The proof of import: every tensor that we load is, bit for bit, a published one."""

import json

import google_crc32c
import pytest

from medi3d.inflation import KernelPlan
from medi3d.inflation.network import build
from medi3d.models.inception import InceptionV1Classifier
from medi3d.weights.files import read_tensors
from medi3d.weights.keymaps import i3d_jax, i3d_tensorflow
from medi3d.weights.load import load_weights

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


def test_both_tables_fill_the_same_tensors_of_the_network():
    ours = {k for k in InceptionV1Classifier().state_dict() if "num_batches_tracked" not in k}
    assert set(i3d_jax().table.values()) == set(i3d_tensorflow().table.values()) == ours
