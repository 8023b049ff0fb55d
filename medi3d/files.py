"""Files that are either complete or not there."""

import contextlib
import csv
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medi3d.errors import ConfigError, DataError, Medi3dError, first_line

UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; on success it is renamed to `path`.

    The name is random and the file is new, so that in a shared folder nobody can lay a link in its place.
    """
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=f"-{path.name}", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o666 & ~UMASK)
        _sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is renamed to `path`, which is new or empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".tmp-", suffix=f"-{path.name}", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~UMASK)
        os.replace(aside, path)  # the system refuses a folder that is not empty
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file is on the disk: after a power failure a renamed file must not be empty."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(
    path: Path, kind: type[Medi3dError] = DataError, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Report a failure to write as one line that names `path`.

    Args:
        path: what is written.
        kind: the error to raise.
        also: exceptions beside `OSError` with which a library reports that a file cannot be written.

    Raises:
        Medi3dError: of that kind.
    """
    expected: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except expected as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if getattr(error, "errno", None) == errno.ENOSPC:
            free = shutil.disk_usage(_existing(path)).free / 1e6
            reason = f"no space left on the disk ({free:.0f} MB free)"
        raise kind(f"{path}: cannot be written: {reason}") from error


def _existing(path: Path) -> Path:
    return next((one for one in (path, *path.parents) if one.exists()), Path())


@contextlib.contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder for this process alone; the lock ends with the process, however it ends.

    Args:
        folder: made if it is not there.
        doing: what another process that holds it is doing, for the message.

    Raises:
        ConfigError: another process holds the folder.
        DataError: it cannot be written.
    """
    import fcntl  # not on every system, and the ground must import everywhere

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{folder}: another process is {doing}; wait for it, or choose another folder"
            ) from error
        yield


FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Text that begins so is a formula to a spreadsheet; it is written behind an apostrophe."""


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV; the columns are those of all rows, in the order of their first appearance.

    Raises:
        DataError: it cannot be written.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (
        writing(path),
        written_aside(path) as aside,
        aside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def read_table(path: Path, words: Collection[str] = ()) -> list[dict[str, Any]]:
    """Rows of a CSV from `write_table`, numbers parsed except in columns `words`; [] without a file.

    Raises:
        DataError: the file is not such a table.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {name: _text(cell) if name in words else _value(cell) for name, cell in row.items()}
                for row in csv.DictReader(file, strict=True)
            ]
    except (OSError, UnicodeDecodeError, csv.Error, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable table ({first_line(error)})") from error


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(FORMULA):
        return f"'{value}"
    return f"{value:.6g}" if isinstance(value, float) else value


def _text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def _value(cell: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell)
    return _text(cell)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
