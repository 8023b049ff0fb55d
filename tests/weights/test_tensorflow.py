"""TensorFlow's checkpoints, written here by a small writer of its own (LevelDB's table, protocol buffers)."""

import struct

import google_crc32c
import numpy as np
import pytest
import torch

from medi3d.errors import WeightsError
from medi3d.inflation import KernelPlan
from medi3d.inflation.network import build
from medi3d.models.inception import InceptionV1
from medi3d.weights.files import read_tensors
from medi3d.weights.keymaps import i3d_tensorflow
from medi3d.weights.load import load_weights
from medi3d.weights.tensorflow import read_index

NUMBERS = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19, "bool": 10}


def varint(value):
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def masked(content):
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def block(entries, restart_every=3):
    body, restarts, before = b"", [], b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % restart_every:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        else:
            restarts.append(len(body))
        body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    restarts = restarts or [0]
    return body + b"".join(struct.pack("<I", r) for r in (*restarts, len(restarts)))


def table(entries, per_block=4, compression=0):
    content, handles = b"", []

    def add(body):
        nonlocal content
        handle = varint(len(content)) + varint(len(body))
        content += body + bytes([compression]) + masked(body + bytes([compression]))
        return handle

    for start in range(0, len(entries), per_block):
        part = entries[start : start + per_block]
        handles.append((part[-1][0] + b"~", add(block(part))))
    meta, index = add(block([])), add(block(handles, 1))
    return content + (meta + index).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


@pytest.fixture
def write(tmp_path):
    """Write arrays as a checkpoint, and give its index file."""

    def write(arrays, parts=1, **how):
        data, entries = b"", [(b"", field(1, parts) + field(3, field(1, 1)))]
        for name, array in sorted(arrays.items()):
            content = array.tobytes()
            shape = b"".join(field(2, field(1, size)) for size in array.shape)
            entry = field(1, NUMBERS[str(array.dtype)]) + field(2, shape)
            entry += (field(4, len(data)) if data else b"") + field(5, len(content))
            entries.append((name.encode(), entry + varint(6 << 3 | 5) + masked(content)))
            data += content
        (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(data)
        path = tmp_path / "model.ckpt.index"
        path.write_bytes(table(entries, **how))
        return path

    return write


def arrays():
    draw = np.random.default_rng(0)
    kernels = {f"RGB/conv_{i}/w": draw.random((2, 3, i + 1), np.float32) for i in range(9)}
    kinds = {f"RGB/kind/{k}": np.arange(6).reshape(2, 3).astype(k) for k in ("float64", "int64", "float16")}
    return {**kernels, **kinds, "scalar": np.full((), 3, np.float32)}


def test_every_tensor_is_read_by_name(write):
    tensors = read_tensors(write(arrays()))
    assert set(tensors) == set(arrays())
    for name, array in arrays().items():
        torch.testing.assert_close(tensors[name], torch.from_numpy(array), rtol=0, atol=0)


def test_the_index_says_what_the_published_ones_say(write):
    path = write(arrays())
    variable = read_index(path)["RGB/conv_3/w"]
    assert (variable.dtype, variable.shape, variable.size) == (1, (2, 3, 4), 96)
    assert variable.crc32c == struct.unpack("<I", masked(arrays()["RGB/conv_3/w"].tobytes()))[0]


def test_a_checkpoint_fills_the_first_layer_of_i3d(write):
    table = {k: v for k, v in i3d_tensorflow().table.items() if "Conv3d_1a" in k}
    network, _ = build(InceptionV1(("Conv3d_1a_7x7",)), KernelPlan.video())
    ours = network.network.state_dict()
    draw = np.random.default_rng(0)
    published = {}
    for name, key in table.items():
        shape = tuple(ours[key].permute(2, 3, 4, 1, 0).shape) if ours[key].dim() == 5 else ours[key].shape
        published[name] = draw.random(shape, np.float32)
    load_weights(network, write(published), keymap="i3d_tensorflow_rgb")
    kernel = torch.from_numpy(published["RGB/inception_i3d/Conv3d_1a_7x7/conv_3d/w"])
    assert torch.equal(
        network.network.state_dict()["Conv3d_1a_7x7.conv.weight"], kernel.permute(4, 3, 0, 1, 2)
    )


@pytest.mark.parametrize("at", [10, 100, -60, -3])
def test_a_changed_byte_of_the_index_is_found(write, at):
    path = write(arrays())
    content = bytearray(path.read_bytes())
    content[at] ^= 0x41
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model.ckpt.index: not a whole TensorFlow index") as refusal:
        read_tensors(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99], ids="{:.0%}".format)
def test_a_cut_index_is_refused(write, share):
    path = write(arrays())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(WeightsError, match="not a whole TensorFlow index"):
        read_tensors(path)


def test_a_changed_byte_of_a_tensor_is_found(write):
    path = write(arrays())
    data = path.with_suffix(".data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[1] ^= 1
    data.write_bytes(content)
    with pytest.raises(WeightsError, match="RGB/conv_0/w does not match its checksum in the index"):
        read_tensors(path)


def test_cut_and_missing_tensors_are_named(write):
    path = write(arrays())
    data = path.with_suffix(".data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="truncated, scalar would end after"):
        read_tensors(path)
    data.unlink()
    with pytest.raises(WeightsError, match=r"model.ckpt.data-00000-of-00001 is missing"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("how", "message"),
    [({"parts": 2}, "in 2 parts, only one can be read"), ({"compression": 1}, "it is compressed")],
    ids=["parts", "compressed"],
)
def test_kinds_of_checkpoints_that_are_not_read_say_so(write, how, message):
    with pytest.raises(WeightsError, match=message):
        read_tensors(write(arrays(), **how))


def test_a_type_that_is_not_read_is_named(write):
    with pytest.raises(WeightsError, match="x is of TensorFlow's type 10, which is not read"):
        read_tensors(write({"x": np.ones(2, bool)}))
