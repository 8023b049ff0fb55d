#!/usr/bin/env python
"""Dice of masks resampled to 1 mm or another spacing and back, per set, for structures of over 50 voxels.

Usage: python benchmarks/geometry.py [--data ../shared/data] [SET ...]

Two ways are measured. `labels`: a label map on each grid, as for training labels. `probabilities`: each class
as a share between 0 and 1 on the 1 mm grid, as for a prediction. Where a set has no labels, the mask is the
voxels above the median.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from medi3d.datasets.images.files import read_volume
from medi3d.datasets.images.geometry import grid_difference
from medi3d.datasets.images.preprocessing import restore_mask, to_array, to_canonical
from medi3d.datasets.images.resampling import (
    interpolate,
    oriented_grid,
    restored_slabs,
    taps_between,
    turned_like,
)

SETS = {
    "Hippocampus": "Task04_Hippocampus/labelsTr/*.nii.gz",
    "OpenKBP": "OpenKBP_HeadNeckCT/labelsTr/*.nii.gz",
    "ACDC": "ACDC_subset_nominal_spacing/labelsTr/*.nii.gz",
    "BraTS": "BraTS2013_DeepMedicExample/labelsTr/*.nii.gz",
    "SynthSeg": "SynthSeg_label_maps/**/*.nii.gz",
    "TotalSegmentator": "sample_volumes/totalsegmentator/*_seg*.nii.gz",
    "pyradiomics": "sample_volumes/pyradiomics/*_label.nrrd",
    "elastix": "sample_volumes/elastix/*[kn].mha",
    "TotalSegmentator DICOM": "dicom/totalsegmentator_ct/*.nii.gz",
    "DICOM series": "dicom/*/Study*/*",
}
Triple = tuple[float, float, float]

SMALLEST = 50
MARGIN = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", help="default: all")
    default = Path(os.environ.get("MEDI3D_SHARED", "../shared")) / "data"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--files", type=int, help="maximum number of files per set")
    parser.add_argument(
        "--spacing", type=float, nargs=3, default=(1.0, 1.0, 1.0), help="mm: depth, height, width"
    )
    given = parser.parse_args()
    print("| set | files | structures | labels: worst | mean | probabilities: worst | mean | grid kept |")
    print("|---|---|---|---|---|---|---|---|")
    for name in given.sets or SETS:
        print(row(name, sorted(given.data.glob(SETS[name]))[: given.files], tuple(given.spacing)), flush=True)


def row(name: str, files: list[Path], spacing: Triple) -> str:
    found, kept = [], 0
    for file in files:
        mask = read_mask(file)
        canonical = to_canonical(mask, spacing, label=True)
        back = restore_mask(to_array(canonical), canonical, mask)
        kept += not grid_difference(back, mask) and back.GetDirection() == mask.GetDirection()
        found += list(scores(mask, back, spacing))
    if not found:
        return f"| {name} | {len(files)} | 0 | | | | | {kept} |"
    hard, soft = np.array(found).T
    numbers = f"{hard.min():.4f} | {hard.mean():.4f} | {soft.min():.4f} | {soft.mean():.4f}"
    return f"| {name} | {len(files)} | {len(found)} | {numbers} | {kept} of {len(files)} |"


def read_mask(path: Path) -> sitk.Image:
    image = read_volume(path)
    if path.is_dir():
        image = image > float(np.median(sitk.GetArrayViewFromImage(image)))
    return sitk.Cast(image, sitk.sitkUInt16)


def scores(mask: sitk.Image, back: sitk.Image, spacing: Triple) -> Iterator[tuple[float, float]]:
    before, after = sitk.GetArrayViewFromImage(mask), sitk.GetArrayViewFromImage(back)
    for value in np.unique(before)[1:]:
        if (before == value).sum() > SMALLEST:
            yield dice(before == value, after == value), by_probability(mask == int(value), spacing)


def by_probability(mask: sitk.Image, spacing: Triple) -> float:
    """Dice of one cropped structure after its share is resampled and back, thresholded at one half."""
    places = np.argwhere(sitk.GetArrayViewFromImage(mask))
    low, high = np.maximum(places.min(0) - MARGIN, 0)[::-1], (places.max(0) + 1 + MARGIN)[::-1]
    part = mask[tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))]
    grid = oriented_grid(part)
    canonical = to_canonical(part, spacing, label=True)
    share = torch.from_numpy(sitk.GetArrayFromImage(sitk.DICOMOrient(part, "LPS"))).float()
    slabs = interpolate(share, taps_between(grid, canonical))[None].split(8, dim=1)
    back = torch.cat(list(restored_slabs(slabs, canonical, grid)), dim=1)[0]
    image = sitk.GetImageFromArray((back >= 0.5).to(torch.uint8).numpy())
    image.CopyInformation(grid)
    return dice(*(sitk.GetArrayFromImage(one) > 0 for one in (part, turned_like(image, part))))


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


if __name__ == "__main__":
    main()
