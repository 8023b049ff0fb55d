"""A disk cache of cases as the network takes them: read, resampled and normalised once.

One file per case, named by a digest of its image and label files and of the settings that shape it.
So a file is never stale: other bytes or settings have another name. It is written aside and renamed:
a killed process leaves no partial file, and two processes can write the same case at once.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medi3d.datasets.cohorts.cases import load_case
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.formats import content_files, place_of
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.datasets.sampling.patches import PLACES, labelled_voxels
from medi3d.errors import DataError, Medi3dError
from medi3d.files import writing
from medi3d.keys import stable_dict
from medi3d.processes import process_pool

VERSION = 1
"""Raised when reading, resampling or normalising changes, so that older files are not used."""

ASIDE = ".tmp"
"""Suffix of folders in which files are written, NAME.PROCESS.tmp: safetensors has temporary files too."""

SHAPING = {
    *("channels", "spacing", "normalisation", "labels", "empty_labels", "overlaps"),
    *("by_channel", "nan", "missing_channels"),
}
"""Keys of `VolumeSettings` on which a loaded case depends."""


def load_cached(case: Case, settings: VolumeSettings) -> dict[str, Any]:
    """Load a case as `load_case` does, from the folder `settings.cache`; it is added if missing.

    The tensors are memory-mapped: only the part of a case that a patch touches is read. "places" are the
    voxels of each label, as `sample_patch` takes them.

    Raises:
        DataError: as `load_case`; or the folder cannot be written.
    """
    assert settings.cache is not None
    path = cache_path(case, settings)
    try:
        stored = load_file(path)
    except (FileNotFoundError, SafetensorError):  # not made yet, or damaged on disk: it is made again
        _store(load_case(case, settings), path)
        stored = load_file(path)
    sample = {"name": case.name, "image": stored["image"], "spacing": tuple(stored["spacing"].tolist())}
    if "label" in stored:
        highest = sum(key.startswith("places.") for key in stored)
        places = [stored[f"places.{number}"] for number in range(1, highest + 1)]
        sample |= {"label": stored["label"], "places": places}
    return sample


def cache_path(case: Case, settings: VolumeSettings) -> Path:
    """Path of a cached case: its name, and a digest of its files and of the settings that shape it.

    Raises:
        DataError: a file of the case cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    chosen = {key: value for key, value in stable_dict(settings).items() if key in SHAPING}
    digest.update(json.dumps([VERSION, chosen], sort_keys=True).encode())
    names = " ".join(name for name, _ in case.structures)
    for path in (*case.images, *case.label_files):
        digest.update(f"\0image or label\0{names}{place_of(path)[1]}".encode())
        for part in content_files(path):
            try:
                with part.open("rb") as file:
                    digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
            except OSError as error:
                raise DataError(f"{part}: cannot be read ({error.strerror})") from error
    return Path(str(settings.cache)) / f"{case.name}-{digest.hexdigest()}.safetensors"


def fill_cache(cases: Sequence[Case], settings: VolumeSettings, workers: int) -> Iterator[str | None]:
    """Add missing cases in parallel; yield for each case, as it finishes, None or what is wrong with it."""
    with process_pool(workers) as pool:
        futures = [pool.submit(_problem, case, settings) for case in cases]
        for future in as_completed(futures):
            yield future.result()
    _sweep(Path(str(settings.cache)))


def _sweep(folder: Path) -> None:
    """Remove the remains of killed processes for files that another process has made since."""
    for aside in folder.glob(f"*{ASIDE}"):
        if aside.with_name(aside.name.rsplit(".", 2)[0]).exists():
            shutil.rmtree(aside, ignore_errors=True)


def _problem(case: Case, settings: VolumeSettings) -> str | None:
    torch.set_num_threads(1)
    try:
        load_cached(case, settings)
    except Medi3dError as error:
        return str(error)
    return None


def _store(sample: dict[str, Any], path: Path) -> None:
    tensors = {"image": sample["image"], "spacing": torch.tensor(sample["spacing"], dtype=torch.float64)}
    if "label" in sample:
        tensors["label"] = sample["label"]
        for number, places in enumerate(labelled_voxels(sample["label"], PLACES), 1):
            tensors[f"places.{number}"] = places
    aside = path.with_name(f"{path.name}.{os.getpid()}{ASIDE}")
    with writing(path, also=(SafetensorError,)):
        aside.mkdir(parents=True, exist_ok=True)
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside / path.name)
            os.replace(aside / path.name, path)
        except (FileNotFoundError, SafetensorError):  # another process was first, and removed this folder
            if not path.exists():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
