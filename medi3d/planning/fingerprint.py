"""Describe a cohort: the grid, intensities and labels of each case, and all faults at once."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from medi3d.datasets.cohorts.cases import load_label
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.files import read_channels
from medi3d.datasets.images.geometry import grid_difference, spacing_dhw
from medi3d.datasets.images.preprocessing import (
    constant,
    constant_background,
    intensity_range,
    to_array,
    without_nan,
)
from medi3d.datasets.images.settings import Normalisation, VolumeSettings
from medi3d.errors import DataError, Medi3dError
from medi3d.processes import process_pool

SAMPLES = 2000
"""Labelled voxels of a case whose intensities are kept, at equal distances in memory."""

AIR = -500.0
"""HU. MR has no such values; every CT shows some air or padding."""


@dataclass(frozen=True)
class CaseFacts:
    """One case on its own grid, oriented.

    Attributes:
        name: of the case.
        shape: (depth, height, width) in voxels.
        spacing: (depth, height, width) in mm.
        orientation: of the file, as DICOM names axes, such as LPS.
        digest: of the voxels; two cases with the same digest are the same image.
        intensities: by channel, low, high, mean and deviation of the whole image; "background", the share of
            voxels with one value if that is more than half (or NaN), else 0; and "clipped", the share of
            labelled voxels beyond the 0.5 and 99.5 percentile of the foreground.
        samples: by channel, intensities of some labelled voxels; of any voxels if nothing is labelled.
        millilitres: label -> volume.
        pieces: label -> connected pieces (voxels that touch at a face, edge or corner).
        largest: label -> share of its voxels in the largest piece; 0 where it is absent.
    """

    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str
    digest: str
    intensities: list[dict[str, float]]
    samples: list[list[float]] = field(repr=False)
    millilitres: dict[str, float]
    pieces: dict[str, int]
    largest: dict[str, float]


def examine_case(case: Case, settings: VolumeSettings) -> CaseFacts:
    """Read a case and describe it; nothing is resampled or normalised.

    Args:
        case: The case.
        settings: How files are read; the rest is not used.

    Raises:
        DataError: The case is damaged or does not fit the settings; see `load_image` and `load_label`.
    """
    files = [(path, channel) for path in case.images for channel in read_channels(path)]
    if len(files) != settings.channels:
        raise DataError(
            f"{case.images[0]}: {len(files)} channels, but the config says channels: {settings.channels}"
        )
    first, arrays, fills = files[0][1], [], []
    for path, channel in files:
        if difference := grid_difference(channel, first):
            raise DataError(f"{path}: not on the grid of {files[0][0]}: {difference}")
        channel.CopyInformation(first)
        as_read, fill = without_nan(sitk.Cast(channel, sitk.sitkFloat32), settings, path)
        array = to_array(sitk.DICOMOrient(channel if fill is None else as_read, "LPS"))
        if array.min() == array.max() and settings.missing_channels == "refuse":
            raise DataError(f"{path}: {constant(array, settings.channels)}")
        arrays.append(array)
        fills.append(fill)
    if all(array.min() == array.max() for array in arrays):
        raise DataError(f"{case.images[0]}: no channel of this case has contrast; at least one must")
    oriented = sitk.DICOMOrient(first, "LPS")
    labels = _labels(case, settings, first)
    inside = labels > 0 if labels is not None and labels.any() else np.ones(arrays[0].shape, bool)
    marked = labels is not None and bool(labels.any())
    depth, height, width = arrays[0].shape
    spacing = spacing_dhw(oriented)
    return CaseFacts(
        name=case.name,
        shape=(depth, height, width),
        spacing=spacing,
        orientation=sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(first.GetDirection()),
        digest=_digest(arrays),
        intensities=[
            _intensities(*pair, inside if marked else None) for pair in zip(arrays, fills, strict=True)
        ],
        samples=[_some(array[inside]).tolist() for array in arrays],
        **_label_facts(labels, settings, float(np.prod(spacing)) / 1000),
    )


def _labels(case: Case, settings: VolumeSettings, image: sitk.Image) -> np.ndarray | None:
    if not case.label_files:
        return None
    return to_array(sitk.DICOMOrient(load_label(case, settings, image), "LPS"))


def _digest(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _intensities(array: np.ndarray, fill: float | None, labelled: np.ndarray | None) -> dict[str, float]:
    facts = {
        "low": float(array.min()),
        "high": float(array.max()),
        "mean": float(array.mean(dtype=np.float64)),
        "deviation": float(array.std(dtype=np.float64)),
        "background": 0.0,
        "clipped": 0.0,
    }
    if facts["low"] == facts["high"]:
        return facts
    value = constant_background(array) if fill is None else fill
    if value is not None:
        facts["background"] = float((array == value).mean())
    if labelled is not None:
        low, high = intensity_range(array, Normalisation(background="ignored"), fill)
        facts["clipped"] = float(((array[labelled] < low) | (array[labelled] > high)).mean())
    return facts


def _some(values: np.ndarray) -> np.ndarray:
    return values[np.linspace(0, len(values) - 1, min(len(values), SAMPLES)).astype(int)].astype(float)


def _label_facts(labels: np.ndarray | None, settings: VolumeSettings, millilitre: float) -> dict[str, Any]:
    facts: dict[str, Any] = {"millilitres": {}, "pieces": {}, "largest": {}}
    if labels is None:
        return facts
    for number, name in enumerate(settings.label_names, 1):
        parts, count = ndimage.label(labels == number, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        facts["millilitres"][name] = float(sizes.sum()) * millilitre
        facts["pieces"][name] = int(count)
        facts["largest"][name] = float(sizes.max() / sizes.sum()) if count else 0.0
    return facts


@dataclass(frozen=True)
class Fingerprint:
    """A cohort: its sound cases, and one line for each faulty one."""

    cases: list[CaseFacts]
    problems: list[str]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Median voxel sides (depth, height, width) in mm."""
        depth, height, width = (median(case.spacing[axis] for case in self.cases) for axis in range(3))
        return (depth, height, width)

    @property
    def extent(self) -> tuple[float, float, float]:
        """Median size of a case (depth, height, width) in mm."""
        sides = [[n * s for n, s in zip(case.shape, case.spacing, strict=True)] for case in self.cases]
        depth, height, width = (median(side[axis] for side in sides) for axis in range(3))
        return (depth, height, width)

    @property
    def unevenness(self) -> float:
        """Ratio of the longest voxel side of the cases to the shortest, along the worst axis."""
        sides = zip(*(case.spacing for case in self.cases), strict=True)
        return max(max(along) / min(along) for along in sides)

    def of_channel(self, channel: int) -> list[dict[str, float]]:
        """Intensities of a channel in the cases that have it."""
        facts = [case.intensities[channel] for case in self.cases]
        return [one for one in facts if one["low"] < one["high"]]

    def modality(self, channel: int = 0) -> str | None:
        """CT if most cases have air in HU, MR if none has a negative value, None if it is not clear."""
        facts = self.of_channel(channel)
        if not facts:
            return None
        lows = [one["low"] for one in facts]
        if median(lows) <= AIR and median(one["high"] for one in facts) > 0:
            return "CT"
        return "MR" if min(lows) >= 0 else None

    def percentiles(self, low: float, high: float, channel: int = 0) -> tuple[float, float]:
        """Percentiles of the labelled voxels' intensities, pooled over the cases that have the channel."""
        there = [c for c in self.cases if c.intensities[channel]["low"] < c.intensities[channel]["high"]]
        pooled = np.concatenate([case.samples[channel] for case in there or self.cases])
        first, last = np.percentile(pooled, [low, high])
        return (float(first), float(last))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the samples."""
        cases = [{k: v for k, v in vars(case).items() if k != "samples"} for case in self.cases]
        medians = {"spacing": self.spacing, "extent_mm": self.extent} if self.cases else {}
        return {**medians, "cases": cases, "problems": self.problems}


def examine_cohort(
    cases: Sequence[Case], settings: VolumeSettings, workers: int
) -> Iterator[CaseFacts | str]:
    """Examine the cases in parallel; yield each as it finishes: its facts, or a line about its fault."""
    with process_pool(workers) as pool:
        futures = [pool.submit(_facts_or_problem, case, settings) for case in cases]
        for future in as_completed(futures):
            yield future.result()


def _facts_or_problem(case: Case, settings: VolumeSettings) -> CaseFacts | str:
    try:
        return examine_case(case, settings)
    except Medi3dError as error:
        return str(error)


def gather(results: Sequence[CaseFacts | str]) -> Fingerprint:
    """Collect the results of `examine_cohort`; the same image in two cases is a problem too."""
    facts = sorted((r for r in results if isinstance(r, CaseFacts)), key=lambda case: case.name)
    problems = sorted(result for result in results if isinstance(result, str))
    seen: dict[str, str] = {}
    for case in facts:
        if case.digest in seen:
            problems.append(f"{case.name}: has the voxels of {seen[case.digest]}; each image belongs in once")
        seen.setdefault(case.digest, case.name)
    return Fingerprint(facts, problems)
