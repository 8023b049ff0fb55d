"""Files that are either complete or not there."""

import contextlib
import csv
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; on success it is renamed to `path`."""
    aside = path.with_name(f".tmp-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV; the columns are those of all rows, in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with written_aside(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def read_table(path: Path, words: Collection[str] = ()) -> list[dict[str, Any]]:
    """Rows of a CSV from `write_table`, numbers parsed except in columns `words`; [] without a file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            {name: cell if name in words else _value(cell) for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(cell: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell)
    return cell


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
