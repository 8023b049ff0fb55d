"""Read cohorts in nnU-Net's raw layout (version 2).

    Dataset004_Hippocampus/  dataset.json
      imagesTr/CASE_0000.nii.gz  CASE_0001.nii.gz  labelsTr/CASE.nii.gz  imagesTs/  (labelsTs/)

Isensee et al. 2021, doi:10.1038/s41592-020-01008-z; documentation/dataset_format.md of MIC-DKFZ/nnUNet.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medi3d.datasets.images.formats import VOLUMES
from medi3d.errors import DataError


def is_nnunet(described: Mapping[str, Any]) -> bool:
    """Whether a `dataset.json` is nnU-Net's: it names channels, and lists no cases as MSD's does."""
    return "channel_names" in described and "training" not in described


def read_rows(described: Mapping[str, Any], listing: Path) -> list[dict[str, Any]]:
    """The rows of a list of cases, for `read_cohort`; those of `imagesTs` have the split "test".

    Args:
        described: Content of the file.
        listing: The file, `dataset.json`, in the folder of the images.

    Raises:
        DataError: Labels are regions or to be ignored, a case lacks a channel or its label, or the number
            of cases differs from the stated one.
    """
    _check_labels(described, listing)
    ending, channels = described.get("file_ending"), len(described["channel_names"])
    if ending not in VOLUMES:
        known = ", ".join(VOLUMES)
        raise DataError(f"{listing}: file_ending is {ending!r}; images are read as {known}")
    if isinstance(described.get("dataset"), dict):
        rows = _named_rows(described["dataset"], listing)
    else:
        rows = _found_rows(listing, "Tr", ending, channels)
    stated = described.get("numTraining")
    if stated is not None and stated != len(rows):
        raise DataError(f"{listing}: numTraining is {stated}, but there are {len(rows)} training cases")
    if (listing.parent / "imagesTs").is_dir():
        rows += [{**row, "split": "test"} for row in _found_rows(listing, "Ts", ending, channels)]
    return rows


def _check_labels(described: Mapping[str, Any], listing: Path) -> None:
    labels = described.get("labels")
    for name, value in labels.items() if isinstance(labels, dict) else ():
        if isinstance(value, list | tuple):
            raise DataError(
                f"{listing}: label {name} is a region, of the values {list(value)}; regions are not "
                "supported: give each label one value"
            )
        if name == "ignore":
            raise DataError(f"{listing}: label ignore ({value}): voxels to be ignored are not supported")


def _named_rows(cases: Mapping[str, Any], listing: Path) -> list[dict[str, Any]]:
    """Rows from the optional key "dataset": case -> its images and label."""
    try:
        return [
            {"name": name, "image": case["images"], "label": case["label"]} for name, case in cases.items()
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{listing}: dataset: each case needs images and label ({error!r})") from error


def _found_rows(listing: Path, part: str, ending: str, channels: int) -> list[dict[str, Any]]:
    """Rows from the files in `imagesTr` and `labelsTr`, or in `imagesTs` and `labelsTs`."""
    images, labels = (listing.parent / f"{kind}{part}" for kind in ("images", "labels"))
    if not images.is_dir():
        raise DataError(f"{images}: no such folder; nnU-Net's layout has its images there")
    cases: dict[str, list[int]] = {}
    for path in _files(images, ending):
        matched = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(ending))
        if not matched:
            raise DataError(f"{path}: nnU-Net's images are named CASE_0000{ending}, by case and channel")
        cases.setdefault(matched[1], []).append(int(matched[2]))
    for name, found in cases.items():
        if found != list(range(channels)):
            numbers = ", ".join(f"{number:04}" for number in found)
            raise DataError(
                f"{images / name}: has the channels {numbers}; expected {channels} (channel_names)"
            )
    labelled = {path.name.removesuffix(ending) for path in _files(labels, ending)}
    if part == "Tr" or labelled:  # a test set may have no labels
        for name in sorted(labelled ^ set(cases)):
            lacks = "no image" if name in labelled else "no label"
            raise DataError(f"{(labels if name in labelled else images) / name}: has {lacks} of its name")
    return [
        {
            "name": name,
            "image": [f"{images.name}/{name}_{number:04}{ending}" for number in range(channels)],
            "label": f"{labels.name}/{name}{ending}" if name in labelled else None,
        }
        for name in cases
    ]


def _files(folder: Path, ending: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{ending}") if not path.name.startswith("."))
