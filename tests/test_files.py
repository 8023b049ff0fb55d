"""Files are whole or not there, in a place of their own, and a failure to write is one line."""

import errno
import os

import pytest

from medi3d.errors import ConfigError, DataError
from medi3d.files import alone_in, folder_aside, read_table, write_table, writing, written_aside


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(TypeError), written_aside(target) as aside:
        aside.write_bytes("half")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "old"


def test_a_link_laid_for_the_temporary_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".tmp-a.txt").symlink_to(victim)  # its name before it was random
    names = set()
    for _ in range(2):
        with written_aside(tmp_path / "a.txt") as aside:
            names.add(aside.name)
            aside.write_text("new")
    assert len(names) == 2
    assert victim.read_text() == "mine"
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_of_the_user_is_not_taken_for_ours(tmp_path):
    (tmp_path / "bun.tmp").mkdir()
    (tmp_path / "bun.tmp" / "kept").touch()
    with folder_aside(tmp_path / "bun") as aside:
        (aside / "new").touch()
    assert (tmp_path / "bun" / "new").exists()
    assert (tmp_path / "bun.tmp" / "kept").exists()
    with pytest.raises(OSError, match="not empty"), folder_aside(tmp_path / "bun"):
        pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"no space left on the disk \(\d+ MB free\)"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (RuntimeError("PytorchStreamWriter failed\nat line 5"), "PytorchStreamWriter failed$"),
    ],
    ids=["full", "read-only", "of a library"],
)
def test_a_failure_to_write_is_one_line_that_names_the_file(tmp_path, error, words):
    with pytest.raises(DataError, match=rf"a\.csv: cannot be written: {words}"):  # noqa: SIM117
        with writing(tmp_path / "none" / "a.csv", also=(RuntimeError,)):
            raise error


def test_a_folder_is_held_by_one(tmp_path):
    with alone_in(tmp_path, "training here"), pytest.raises(ConfigError, match="is training here; wait"):  # noqa: SIM117
        with alone_in(tmp_path, "training here"):
            pass
    with alone_in(tmp_path, "training here"):
        pass


@pytest.mark.parametrize("text", ["=1+1", "@SUM(A1)", "-2", "+x", "plain", "'quoted"])
def test_text_is_no_formula_in_a_table_and_comes_back(tmp_path, text):
    write_table(tmp_path / "t.csv", [{"case": text, "dice": -0.5}])
    assert not (tmp_path / "t.csv").read_text().splitlines()[1].startswith(("=", "@", "+", "-"))
    assert read_table(tmp_path / "t.csv", words=("case",)) == [{"case": text, "dice": -0.5}]


def test_names_that_are_no_text_are_written_all_the_same(tmp_path):
    write_table(tmp_path / "t.csv", [{"case": b"scan\xff".decode(errors="surrogateescape")}])
    assert read_table(tmp_path / "t.csv")[0]["case"] == r"scan\udcff"


@pytest.mark.parametrize("content", [b"a,b\n1\n", b"\xff\xfe", b'a\n"x'], ids=["short", "no text", "cut"])
def test_a_damaged_table_is_one_line(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.csv: not a readable table"):
        read_table(tmp_path / "t.csv")
