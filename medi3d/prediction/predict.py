"""Masks of many scans: reading, computing and writing overlap; up-to-date masks are skipped."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from medi3d.datasets.images.dicom_seg import write_seg
from medi3d.datasets.images.files import read_header, write_mask
from medi3d.datasets.images.preprocessing import LoadedImage, load_image, to_file_values
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.engine.log import log
from medi3d.engine.metrics import Row
from medi3d.errors import ConfigError, DataError, Medi3dError, first_line
from medi3d.experiment.run import Run
from medi3d.prediction.memory import (
    MemoryBudget,
    band_bytes,
    batch_of,
    forward_bytes,
    reading_bytes,
    resident_bytes,
)
from medi3d.prediction.predictor import Predictor, Segmentation, check_ensemble, load_members, segment
from medi3d.prediction.records import Records, key_of
from medi3d.prediction.scans import FORMATS, Scan, find_scans, refuse_scans_in


@dataclass(frozen=True)
class PredictionOptions:
    """How masks are computed and stored.

    Attributes:
        format: of the masks, see `FORMATS`; "same": of the scan.
        memory_gb: limit for the whole program's main memory; None: no limit.
        overwrite: predict scans again whose mask is up to date.
    """

    format: str = "same"
    memory_gb: float | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"format is {self.format!r}: {', '.join(FORMATS)}")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ConfigError(f"memory is {self.memory_gb}: it must be a number of GB above 0")


def run_prediction(
    runs: Sequence[Run], inputs: Sequence[Path], out: Path, options: PredictionOptions | None = None
) -> tuple[list[Path], list[str]]:
    """Segment scans with the best network of a run. A scan that fails does not stop the others.

    Args:
        runs: one, or several whose probabilities are averaged; each fold of a cross-validation counts as one.
        inputs: NIfTI, NRRD or MetaImage files, folders of one DICOM series each, or folders of these.
        out: folder for the masks, each under the name of its scan (a DICOM series gives NIfTI), and
            `predictions.csv` with volume and confidence of each label.
        options: format, memory, overwriting.

    Returns:
        The masks, written now or earlier, and a line about each scan that failed. A scan that failed has no
        mask in `out`, not even that of an earlier run.

    Raises:
        ConfigError: a run does not segment, the runs do not fit together, or two inputs would write one mask.
        WeightsError: a run has no usable checkpoint.
    """
    return predict_files([one for run in runs for one in load_members(run)], inputs, out, options)


def predict_files(
    predictors: Sequence[Predictor],
    inputs: Sequence[Path],
    out: Path,
    options: PredictionOptions | None = None,
) -> tuple[list[Path], list[str]]:
    """Segment scans with loaded networks; otherwise like `run_prediction`."""
    check_ensemble(predictors)
    options = options or PredictionOptions()
    scans = find_scans(inputs, out, predictors[0].volumes.channels, options.format)
    refuse_scans_in(out, scans)
    records = Records(out)
    with records.alone():
        return _Batch(predictors, records, options).run(scans)


@dataclass(frozen=True)
class _Read:
    """A scan in memory, as each member of the ensemble takes it; without images: its mask is up to date."""

    scan: Scan
    key: str
    images: list[LoadedImage]
    size: int = 0


@dataclass
class _Batch:
    """Scans in a pipeline: while one is computed, the next is read and the last is written."""

    predictors: Sequence[Predictor]
    records: Records
    options: PredictionOptions
    windows: int = 0  # bytes for forward passes
    budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(None))

    def run(self, scans: Sequence[Scan]) -> tuple[list[Path], list[str]]:
        self._measure()
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            waiting: list[tuple[Scan, Future[None]]] = []
            failed: dict[Scan, str] = {}
            for scan, reading in _ahead(reader, partial(self._read), scans):
                try:
                    read = reading.result()
                    if not read.images:
                        log.info(f"{scan.images[0]}: its mask is up to date, {scan.target}")
                        continue
                    waiting.append((scan, self._compute(read, writer)))
                except (Medi3dError, MemoryError, torch.OutOfMemoryError) as error:
                    failed[scan] = self._fail(scan, error)
                if len(waiting) > 1:  # at most one scan waits to be written
                    waiting[-2][1].exception()
            for scan, writing in waiting:
                try:
                    writing.result()
                except (Medi3dError, MemoryError) as error:
                    failed[scan] = self._fail(scan, error)
        self.records.write_table()
        done = [scan.target for scan in scans if scan not in failed]
        return done, [failed[scan] for scan in scans if scan in failed]

    def _measure(self) -> None:
        """Compute the memory left for scans after networks and windows."""
        if self.options.memory_gb is None:
            return
        self.windows = max(forward_bytes(one.windowed, torch.zeros(batch_of(one))) for one in self.predictors)
        limit = int(self.options.memory_gb * 1e9)
        left = limit - resident_bytes() - self.windows
        if left <= 0:
            raise ConfigError(
                f"--memory {self.options.memory_gb}: the program holds {resident_bytes() / 1e9:.2f} GB and "
                f"its windows take about {self.windows / 1e9:.2f} GB more; allow more"
            )
        self.budget = MemoryBudget(left)

    def _read(self, scan: Scan) -> _Read:
        key = key_of(scan.images, [one.identity for one in self.predictors])
        if not self.options.overwrite and self.records.holds(scan, key):
            return _Read(scan, key, [])
        self.records.drop(scan)
        size = self._estimate(scan)
        self.budget.take(size, str(scan.images[0]))
        try:
            images: list[LoadedImage] = []
            for one in self.predictors:
                loaded = zip(self.predictors, images, strict=False)
                same = [image for other, image in loaded if _loads_alike(other.volumes, one.volumes)]
                images.append(same[0] if same else load_image(scan.images, one.volumes))
        except BaseException:
            self.budget.give_back(size)
            raise
        return _Read(scan, key, images, size)

    def _fail(self, scan: Scan, error: BaseException) -> str:
        """Remove all files of a failed scan: partial ones, and masks of an earlier run."""
        with contextlib.suppress(Medi3dError):
            self.records.drop(scan)
        return _line(scan, error)

    def _compute(self, read: _Read, writer: ThreadPoolExecutor) -> "Future[None]":
        try:
            segmentation = segment(self.predictors, read.images)
        except BaseException as error:
            self.budget.give_back(read.size)
            if isinstance(error, DataError):
                raise DataError(f"{read.scan.images[0]}: {error}") from error
            raise
        read.images.clear()
        return writer.submit(self._write, read, segmentation)

    def _write(self, read: _Read, segmentation: Segmentation) -> None:
        scan, settings = read.scan, self.predictors[0].volumes
        try:
            mask = to_file_values(segmentation.mask, settings)
            with self.records.staged(scan, read.key, _rows(scan, segmentation, settings)) as folder:
                write_mask(mask, scan.images[0], folder / scan.target.name)
                if scan.seg is not None:
                    values = {name: settings.labels[name] for name in settings.label_names}
                    seg = folder / scan.seg.name
                    write_seg(mask, values, scan.images[0], seg, version=version("medi3d"))
            log.info(f"{scan.images[0]} -> {scan.target}")
        finally:
            self.budget.give_back(read.size)

    def _estimate(self, scan: Scan) -> int:
        """Bytes that a scan takes besides the windows, from its header; 0 without a limit."""
        if self.options.memory_gb is None:
            return 0
        header = read_header(scan.images[0])
        settings = [one.volumes for one in self.predictors]
        loaded = [
            one
            for k, one in enumerate(settings)
            if not any(_loads_alike(one, earlier) for earlier in settings[:k])
        ]
        bands = [band_bytes(header, one) for one in self.predictors]
        return sum(reading_bytes(header, one) for one in loaded) + sum(bands)


def _loads_alike(one: VolumeSettings, other: VolumeSettings) -> bool:
    keys = ("modality", "channels", "spacing", "normalisation", "by_channel", "nan", "missing_channels")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _ahead(reader: ThreadPoolExecutor, read: partial, scans: Sequence[Scan]) -> Iterator[tuple[Scan, Future]]:
    """Scans with their pending reads; each read starts before the previous scan is yielded."""
    pending: list[tuple[Scan, Future]] = []
    for scan in scans:
        pending.append((scan, reader.submit(read, scan)))
        if len(pending) > 1:
            yield pending.pop(0)
    yield from pending


def _rows(scan: Scan, segmentation: Segmentation, settings: VolumeSettings) -> list[Row]:
    millilitres = float(np.prod(segmentation.mask.GetSpacing())) / 1000
    return [
        {
            "case": scan.name,
            "label": name,
            "voxels": voxels,
            "volume_ml": voxels * millilitres,
            "confidence": confidence,
        }
        for name, voxels, confidence in zip(
            settings.label_names, segmentation.voxels, segmentation.confidence, strict=True
        )
    ]


def _line(scan: Scan, error: BaseException) -> str:
    if isinstance(error, Medi3dError):
        return str(error)
    return str(DataError(f"{scan.images[0]}: does not fit into the memory ({first_line(error)})"))
