"""Records of finished masks, so that each is computed once and a stale one is never kept."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medi3d.datasets.images.formats import content_files, place_of
from medi3d.engine.metrics import Row
from medi3d.errors import ConfigError, DataError
from medi3d.files import alone_in, file_sha256, read_table, write_table, writing, written_aside
from medi3d.prediction.scans import Scan

FORMAT = 1
"""Version of the records; a new version recomputes all masks."""

STAGED = "new-"
"""Folders of masks that are being written begin so."""

COLUMNS = {"case", "label", "voxels", "volume_ml", "confidence"}
"""Of `predictions.csv`."""


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
                digest.update(
                    f"{choice}{file.name if folder.is_dir() else ''}\0{file_sha256(file)}\0".encode()
                )
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{error.filename}: no such file or folder") from error
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


class Records:
    """The records in a folder of masks, one file each in `.records/`.

    A record names the files that medi3d wrote and their SHA-256. No other file is ever replaced or removed.

    Args:
        out: the folder of the masks.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._folder, self._table = out, out / ".records", out / "predictions.csv"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder, since two processes would overwrite each other's masks.

        Raises:
            ConfigError: another process holds it, or the table in it is not medi3d's.
            DataError: it cannot be written.
        """
        ours = not self._out.exists()
        with alone_in(self._folder, f"writing masks into {self._out}"):
            for left in self._folder.glob(f"{STAGED}*"):  # by a program that was killed
                shutil.rmtree(left, ignore_errors=True)
            self._refuse_foreign_table()
            try:
                yield
            finally:
                if not any(self._folder.glob("*.json")):  # nothing was written: leave nothing
                    shutil.rmtree(self._folder, ignore_errors=True)
                    if ours:
                        with suppress(OSError):
                            self._out.rmdir()

    def _refuse_foreign_table(self) -> None:
        if any(set(row) - COLUMNS for row in read_table(self._table)[:1]):
            raise ConfigError(f"{self._table}: exists, and is not a table of medi3d; give another --out")

    def holds(self, scan: Scan, key: str) -> bool:
        """Whether the scan's mask, computed under `key`, exists unchanged."""
        record = self._read(self._path(scan))
        return record.get("key") == key and record.get("files") == self._sums(scan)

    @contextmanager
    def staged(self, scan: Scan, key: str, rows: Sequence[Row]) -> Iterator[Path]:
        """Yield a folder for the scan's new files; on success they are recorded, then moved into place.

        They are recorded first: a program that is killed in between leaves no mask without a record.

        Raises:
            DataError: a file cannot be written, or one that medi3d did not write is in its place.
        """
        path = self._path(scan)
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=STAGED, dir=self._folder))
        try:
            yield folder
            made = {file.name: file_sha256(file) for file in folder.iterdir()}
            record = {"key": key, "mask": scan.target.name, "files": made, "rows": list(rows)}
            self._refuse_foreign(scan)
            with writing(path), written_aside(path) as aside:
                aside.write_text(json.dumps(record, indent=1))
            for name in made:
                _publish(folder / name, self._out / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def drop(self, scan: Scan) -> None:
        """Remove an earlier run's files for the scan, so that they cannot be mistaken for new ones.

        Raises:
            DataError: a file cannot be removed, or medi3d did not write it.
        """
        self._refuse_foreign(scan)
        try:
            for old in (*self._own(scan), self._path(scan)):
                old.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{error.filename}: outdated, and cannot be removed: {error.strerror}") from error

    def _refuse_foreign(self, scan: Scan) -> None:
        own = self._own(scan)
        for path in (scan.target, scan.seg):
            if path is not None and (path.exists() or path.is_symlink()) and path not in own:
                raise DataError(
                    f"{path}: exists, and medi3d did not write it so; move it away, or give another --out"
                )

    def _own(self, scan: Scan) -> list[Path]:
        """The scan's files in the folder that are as its record says."""
        recorded = self._read(self._path(scan)).get("files")
        sums = recorded if isinstance(recorded, dict) else {}
        paths = [self._out / name for name in sums if name == Path(name).name]
        return [one for one in paths if _is_plain(one) and file_sha256(one) == sums[one.name]]

    def write_table(self) -> None:
        """Write `predictions.csv`: a row for each label of each mask in the folder.

        Raises:
            DataError: it cannot be written.
        """
        records = [self._read(path) for path in sorted(self._folder.glob("*.json"))]
        there = [record for record in records if (self._out / Path(str(record.get("mask"))).name).is_file()]
        if there or self._table.exists():
            write_table(self._table, [row for record in there for row in record.get("rows") or []])

    def _path(self, scan: Scan) -> Path:
        return self._folder / f"{scan.target.name}.json"

    @staticmethod
    def _sums(scan: Scan) -> dict[str, str]:
        made = [path for path in (scan.target, scan.seg) if path is not None]
        return {path.name: file_sha256(path) for path in made if path.is_file()}

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):  # missing or damaged: the mask is computed again
            return {}
        return record if isinstance(record, dict) else {}


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _publish(made: Path, target: Path) -> None:
    """Move a file to a place where there is none.

    Raises:
        DataError: a file appeared there meanwhile, or the place cannot be written.
    """
    with writing(target):
        try:
            os.link(made, target)  # fails where a file is, which a rename would replace
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if target.exists():
                raise
            os.replace(made, target)
