"""The scans among a list of paths, and the path of each mask."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medi3d.datasets.images.dicom_headers import claims_dicom, holds_dicom
from medi3d.datasets.images.formats import MGH, PAIRS, is_series, place_of, suffix_of, volumes_among
from medi3d.engine.log import log
from medi3d.errors import ConfigError, DataError

FORMATS = {"same": "", "nii": ".nii", "nii.gz": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "seg": ""}
"""Format -> suffix of a mask, "" for that of its scan; "seg" adds a DICOM SEG to that of a DICOM series."""

MASK_SUFFIX = {
    ".mhd": ".mha",
    ".nhdr": ".nrrd",
    "": ".nii.gz",
    **dict.fromkeys((*MGH, *PAIRS, *PAIRS.values()), ".nii.gz"),
}
"""Suffix of a scan -> suffix of its mask, where they differ; a DICOM folder has none."""

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
    """The scans among the paths. Scans of equal names are prefixed by their folder's name.

    Args:
        inputs: files, folders of one DICOM series, or folders of files and of such folders; `out` and folders
            without a scan are left out of these, the latter with a line in the log.
        out: folder of the masks.
        channels: number per case; if several, files NAME_0000, NAME_0001, ... are one case (nnU-Net's
            layout).
        format: of the masks, see `FORMATS`.

    Raises:
        ConfigError: two scans would share one mask.
        DataError: a folder holds slices of a series and volumes side by side.
    """
    paths = [path for given in inputs for path in (given.is_dir() and _scans_in(given, out)) or [given]]
    cases = _grouped(paths, channels)
    names = [_name(case, channels) for case in cases]
    scans: list[Scan] = []
    for case, short in zip(cases, names, strict=True):
        name = f"{case[0].resolve().parent.name}_{short}" if names.count(short) > 1 else short
        suffix = _suffix(case[0])
        target = out / (name + (FORMATS[format] or MASK_SUFFIX.get(suffix, suffix)))
        if any(target == scan.target for scan in scans):
            raise ConfigError(
                f"{case[0]}: another input is also written to {target}; predict them separately"
            )
        seg = out / f"{name}.seg.dcm" if format == "seg" and is_series(case[0]) else None
        scans.append(Scan(name, case, target, seg))
    return scans


def refuse_scans_in(out: Path, scans: Sequence[Scan]) -> None:
    """Refuse to write masks into a folder of scans.

    Raises:
        ConfigError: a scan is, or lies in, the folder `out`.
    """
    for path in (place_of(image)[0] for scan in scans for image in scan.images):
        if out.resolve() in (path.resolve(), path.resolve().parent if path.is_file() else None):
            raise ConfigError(f"{path}: lies in the output folder; give another folder with --out")


def _scans_in(folder: Path, out: Path) -> list[Path]:
    """Volumes and DICOM series in a folder and in those below it; not in `out`, where masks lie."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    volumes = volumes_among(entries)
    slices = [path for path in entries if path not in volumes and claims_dicom(path)]
    if volumes and slices and holds_dicom(folder):  # a structure set beside volumes is no series
        raise DataError(
            f"{folder}: {volumes[0].name} lies beside DICOM slices such as {slices[0].name}; "
            "give the files, or a folder for each"
        )
    scans = volumes or ([folder] if holds_dicom(folder) else [])
    for odd in (path for path in entries if not path.is_file() and not path.is_dir()):
        log.warning(f"{odd}: neither a file nor a folder (a dangling link, a pipe?); left out")
    for below in (path for path in entries if path.is_dir()):
        leads_back = folder.resolve().is_relative_to(below.resolve())  # a link to itself or above
        if not leads_back and below.resolve() != out.resolve():
            found = _scans_in(below, out)
            if not found:
                log.warning(f"{below}: no scan in this folder; left out")
            scans = scans + found
    return scans


def _grouped(paths: Sequence[Path], channels: int) -> list[tuple[Path, ...]]:
    if channels == 1:
        return [(path,) for path in paths]
    groups: dict[tuple[Path, str, str], list[Path]] = {}
    for path in paths:
        groups.setdefault((path.parent, _base(path), _suffix(path)), []).append(path)
    return [tuple(sorted(group)) for group in groups.values()]


def _name(case: tuple[Path, ...], channels: int) -> str:
    path = case[0]
    folder, choice = place_of(path)
    if folder.is_dir():
        return folder.resolve().name + (f"_{choice}" if choice else "")
    if is_series(path):
        return path.stem
    return _base(path) if channels > 1 else _stem(path)


def _base(path: Path) -> str:
    matched = CHANNEL.fullmatch(_stem(path))
    return matched[1] if matched else _stem(path)


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(_suffix(path))]


def _suffix(path: Path) -> str:
    return "" if is_series(path) else suffix_of(path)
