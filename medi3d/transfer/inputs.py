"""Which scans a list of paths means, and where the mask of each goes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medi3d.datasets.files import ITK, NIFTI, suffix_of
from medi3d.errors import ConfigError, DataError

FORMATS = {"same": "", "nii": ".nii", "nii.gz": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "seg": ""}
"""Format -> suffix of a mask, "" for that of its scan; "seg" adds a DICOM SEG to that of a DICOM series."""

MASK_SUFFIX = {".mhd": ".mha", ".nhdr": ".nrrd", "": ".nii.gz"}
"""Suffix of a scan -> of its mask, where they differ; a DICOM folder has none."""

CHANNEL = re.compile(r"(.+)_\d{4}")


@dataclass(frozen=True)
class Scan:
    """A scan to segment.

    Attributes:
        name: of the case.
        images: its files, one for each channel, or one that holds all.
        target: the mask to write.
        seg: the DICOM SEG to write beside it.
    """

    name: str
    images: tuple[Path, ...]
    target: Path
    seg: Path | None = None


def find_scans(inputs: Sequence[Path], out: Path, channels: int, format: str) -> list[Scan]:
    """The scans that paths mean. Where several have one name, that of their folder is put in front.

    Args:
        inputs: files, folders of one DICOM series, or folders of files or of such folders.
        out: folder of the masks.
        channels: of a case; if several, files NAME_0000, NAME_0001, ... are one case (nnU-Net's layout).
        format: of the masks, see `FORMATS`.

    Raises:
        ConfigError: two scans would write one mask, or a mask would replace its scan.
        DataError: a folder holds slices of a series and volumes side by side.
    """
    cases = _grouped([path for given in inputs for path in _expanded(given)], channels)
    names = [_name(case, channels) for case in cases]
    scans: list[Scan] = []
    for case, short in zip(cases, names, strict=True):
        name = f"{case[0].resolve().parent.name}_{short}" if names.count(short) > 1 else short
        suffix = _suffix(case[0])
        target = out / (name + (FORMATS[format] or MASK_SUFFIX.get(suffix, suffix)))
        if any(target == scan.target for scan in scans):
            raise ConfigError(f"{case[0]}: another input is written to {target} too; predict them apart")
        if target.resolve() in [path.resolve() for path in case]:
            raise ConfigError(f"{case[0]}: the mask would replace the scan; give another folder with --out")
        seg = out / f"{name}.seg.dcm" if format == "seg" and case[0].is_dir() else None
        scans.append(Scan(name, case, target, seg))
    return scans


def _expanded(given: Path) -> list[Path]:
    """A folder of scans as these scans; anything else as it is."""
    if not given.is_dir():
        return [given]
    entries = sorted(path for path in given.iterdir() if not path.name.startswith("."))
    volumes = [path for path in entries if path.is_file() and suffix_of(path) in NIFTI + ITK]
    slices = [path for path in entries if path.is_file() and suffix_of(path) in (".dcm", ".ima")]
    if volumes and slices:
        raise DataError(
            f"{given}: {volumes[0].name} lies beside DICOM slices such as {slices[0].name}; "
            "give the files, or a folder for each"
        )
    if volumes:
        return volumes
    if entries and all(path.is_dir() for path in entries):
        return [scan for path in entries for scan in _expanded(path)]
    return [given]


def _grouped(paths: Sequence[Path], channels: int) -> list[tuple[Path, ...]]:
    if channels == 1:
        return [(path,) for path in paths]
    groups: dict[tuple[Path, str, str], list[Path]] = {}
    for path in paths:
        groups.setdefault((path.parent, _base(path), _suffix(path)), []).append(path)
    return [tuple(sorted(group)) for group in groups.values()]


def _name(case: tuple[Path, ...], channels: int) -> str:
    path = case[0]
    if path.is_dir():
        return path.resolve().name
    return _base(path) if channels > 1 else _stem(path)


def _base(path: Path) -> str:
    matched = CHANNEL.fullmatch(_stem(path))
    return matched[1] if matched else _stem(path)


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(_suffix(path))]


def _suffix(path: Path) -> str:
    return "" if path.is_dir() else suffix_of(path)
