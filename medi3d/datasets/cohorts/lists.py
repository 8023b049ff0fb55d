"""Read the rows of a list of cases: CSV, or JSON of several kinds."""

import csv
import difflib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medi3d.datasets.cohorts.nnunet_layout import is_nnunet, read_rows
from medi3d.errors import DataError

log = logging.getLogger(__name__)
Rows = list[dict[str, Any]]

COLUMNS = ("image", "label", "name", "subject", "split", "fold")
PARTS = {"training": None, "validation": "validation", "testing": "test"}
"""Key of a JSON list, as in MONAI -> the split of its rows if they name none."""
FACTS = (
    *("name", "description", "reference", "licence", "license", "release", "relase", "tensorImageSize"),
    *(
        "modality",
        "channel_names",
        "labels",
        "test",
        "numTraining",
        "numTest",
        "numValidation",
        "file_ending",
    ),
    *("dataset", "dataset_name", "overwrite_image_reader_writer", "regions_class_order", "generator"),
    *("converted_by", "citation", "author", "version", "date", "url", "data_release_date"),
)
"""Other keys of `dataset.json`, of MSD's, nnU-Net's and MONAI's."""


def read_csv(path: Path) -> tuple[dict[str, Any], Rows]:
    """An empty description, and the rows; surrounding blanks are stripped from column names and cells.

    Raises:
        DataError: The file is not readable, or has no column "image".
    """
    reader = csv.reader(_text(path).splitlines(), skipinitialspace=True)
    try:
        table = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path}: not a readable CSV list: {error}") from error
    table = [(line, row) for line, row in table if any(row)]
    columns = [_column(name) for name in table[0][1]] if table else []
    if "image" not in columns:
        raise DataError(f"{path}: no column 'image' among {columns}; the first line names the columns")
    doubled = {name for name in columns if name and columns.count(name) > 1}
    if doubled:
        raise DataError(f"{path}: the column {min(doubled)!r} appears twice; column names must be unique")
    for line, row in table[1:]:
        if len(row) > len(columns) and any(row[len(columns) :]):
            raise DataError(
                f"{path}: line {line} has {len(row)} cells where the first line names {len(columns)} columns"
            )
    rows = [dict(zip(columns, row, strict=False)) for _, row in table[1:]]
    _report(path, "column", (name for name in columns if not name.startswith("label:")), COLUMNS)
    return {}, [
        {
            **row,
            "image": [part.strip() for part in row.get("image", "").split(";")],
            "label": row.get("label") or _masks(row),
        }
        for row in rows
    ]


def _text(path: Path) -> str:
    """Decode as UTF-8, or UTF-16 by its byte order mark, else as Windows-1252."""
    try:
        content = path.read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            return content.decode("utf-16")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            if b"\0" in content:
                raise
            return content.decode("cp1252")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable CSV list: {error}") from error


def _column(name: str) -> str:
    word, colon, label = (part.strip() for part in name.partition(":"))
    word = word.lower() if word.lower() in COLUMNS else word
    return f"{word}:{label}" if colon else word


def _masks(row: Mapping[str, Any]) -> dict[str, str]:
    """Name -> mask, from the columns `label:NAME`."""
    named = ((str(column).partition(":"), cell) for column, cell in row.items())
    return {name: cell for (word, _, name), cell in named if word == "label" and name and cell}


def read_json(path: Path) -> tuple[Mapping[str, Any], Rows]:
    """The description in the file, and the rows.

    Raises:
        DataError: The file is not readable, or holds no list of cases.
    """
    try:
        content = json.loads(path.read_bytes())  # of bytes, the byte order mark gives the encoding
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error
    described = content if isinstance(content, dict) else {"training": content}
    _report(path, "key", described, (*PARTS, *FACTS))
    if is_nnunet(described):
        return described, read_rows(described, path)
    rows = [row for key in (*PARTS, "test") for row in _part(described, key, path)]
    _report(path, "key of a case", dict.fromkeys(key for row in rows for key in row), COLUMNS)
    return described, rows


def _part(described: Mapping[str, Any], key: str, path: Path) -> Rows:
    """The rows under a key, with their split; MSD's "test" is a list of names, which are not read."""
    listed = described.get(key, None if key == "training" else [])
    if key == "test" and not (isinstance(listed, list) and all(isinstance(row, dict) for row in listed)):
        return []
    if key == "testing" and isinstance(listed, list):
        listed = [{"image": row} if isinstance(row, str) else row for row in listed]
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise DataError(f"{path}: expected a list of {{image, label}} objects, alone or under '{key}'")
    split = PARTS.get(key, "test")
    if key == "training" and described.get("validation"):
        split = "training"
    return [{**row, "split": row.get("split") or split} if split else dict(row) for row in listed]


def _report(path: Path, kind: str, found: Iterable[str], known: Sequence[str]) -> None:
    """Warn of words in a list that are unknown."""
    for word in found:
        if word and word not in known:
            close = difflib.get_close_matches(str(word).lower(), known, 1)
            meant = f"; {close[0]}?" if close else f"; known are {', '.join(known[:6])}"
            log.warning("%s: the %s %r is not known and not used%s", path, kind, word, meant)
