"""Records of finished masks, so that each is computed once and a stale one is never kept."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medi3d.datasets.images.formats import content_files, place_of
from medi3d.engine.metrics import Row
from medi3d.errors import DataError
from medi3d.files import write_table, written_aside
from medi3d.prediction.scans import Scan

FORMAT = 1
"""Version of the records; a new version recomputes all masks."""


def key_of(images: Iterable[Path], identities: Sequence[str]) -> str:
    """A digest of the scan's files and of everything that predicts its mask.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256(repr((FORMAT, list(identities))).encode())
    try:
        for image in images:
            folder, choice = place_of(image)
            for file in content_files(image):
                digest.update(f"{choice}{file.name if folder.is_dir() else ''}\0{_sum(file)}\0".encode())
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{error.filename}: no such file or folder") from error
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Records:
    """The records in a folder of masks, one file each in `.records/`.

    Args:
        out: the folder of the masks.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._folder = out, out / ".records"

    def holds(self, scan: Scan, key: str) -> bool:
        """Whether the scan's mask, computed under `key`, exists unchanged."""
        record = self._read(self._path(scan))
        return record.get("key") == key and record.get("files") == self._sums(scan)

    def add(self, scan: Scan, key: str, rows: Sequence[Row]) -> None:
        """Record a complete mask.

        Raises:
            DataError: the record cannot be written.
        """
        record = {"key": key, "mask": scan.target.name, "files": self._sums(scan), "rows": list(rows)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with written_aside(self._path(scan)) as aside:
                aside.write_text(json.dumps(record, indent=1))
        except OSError as error:
            raise DataError(f"{self._path(scan)}: cannot be written: {error.strerror}") from error

    def drop(self, scan: Scan) -> None:
        """Remove an earlier run's files for the scan, so that they cannot be mistaken for new ones.

        Raises:
            DataError: a file cannot be removed.
        """
        path = self._path(scan)
        recorded = [self._out / Path(str(name)).name for name in self._read(path).get("files") or ()]
        try:
            for old in {scan.target, *([scan.seg] if scan.seg else []), *recorded, path}:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{error.filename}: outdated, and cannot be removed: {error.strerror}") from error

    def write_table(self) -> None:
        """Write `predictions.csv`: a row for each label of each mask in the folder.

        Raises:
            DataError: it cannot be written.
        """
        if not self._folder.is_dir():
            return
        records = [self._read(path) for path in sorted(self._folder.glob("*.json"))]
        there = [record for record in records if (self._out / str(record.get("mask"))).is_file()]
        try:
            write_table(self._out / "predictions.csv", [row for record in there for row in record["rows"]])
        except OSError as error:
            raise DataError(
                f"{self._out / 'predictions.csv'}: cannot be written: {error.strerror}"
            ) from error

    def _path(self, scan: Scan) -> Path:
        return self._folder / f"{scan.target.name}.json"

    @staticmethod
    def _sums(scan: Scan) -> dict[str, str]:
        made = [path for path in (scan.target, scan.seg) if path is not None]
        return {path.name: _sum(path) for path in made if path.is_file()}

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):  # missing or damaged: the mask is computed again
            return {}
        return record if isinstance(record, dict) else {}
