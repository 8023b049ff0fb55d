"""What labels lose on the network's grid: an upper bound on Dice for any network trained on this grid."""

from collections.abc import Sequence
from statistics import mean

import numpy as np

from medi3d.datasets.cohorts.cases import load_label
from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.images.files import read_grid
from medi3d.datasets.images.preprocessing import restore_mask, to_array, to_canonical
from medi3d.datasets.images.settings import VolumeSettings
from medi3d.processes import process_pool

CASES = 6
"""Number of labelled cases, evenly spaced in the cohort, on which the loss is measured."""


def kept_by_grid(
    cases: Sequence[Case], settings: VolumeSettings, workers: int
) -> dict[str, dict[str, float]]:
    """Dice of labels with themselves after resampling to the grid of `settings` and back, for some cases.

    Returns:
        Label -> "worst" and "mean" over the cases that have it; a label that none of them has is left out.

    Raises:
        DataError: as `load_label`.
    """
    labelled = [case for case in cases if case.label_files]
    places = np.unique(np.linspace(0, len(labelled) - 1, CASES).astype(int)) if labelled else ()
    with process_pool(workers) as pool:
        looked_at = [(labelled[place], settings) for place in places]
        found = list(pool.map(kept_dice, *zip(*looked_at, strict=True))) if looked_at else []
    scores = {name: [case[name] for case in found if name in case] for name in settings.label_names}
    return {name: {"worst": min(v), "mean": mean(v)} for name, v in scores.items() if v}


def kept_dice(case: Case, settings: VolumeSettings) -> dict[str, float]:
    """The same for one case: label -> Dice, between 0 and 1, on the grid (D, H, W) of its label.

    Raises:
        DataError: as `load_label`.
    """
    label = load_label(case, settings, read_grid(case.images[0]))
    spacing = settings.spacing and (settings.spacing[0], settings.spacing[1], settings.spacing[2])
    canonical = to_canonical(label, spacing or None, label=True)
    before, after = to_array(label), to_array(restore_mask(to_array(canonical), canonical, label))
    count = len(settings.file_values)
    sizes = np.bincount(before.ravel(), minlength=count) + np.bincount(after.ravel(), minlength=count)
    common = np.bincount(before[before == after], minlength=count)
    names = enumerate(settings.label_names, 1)
    return {name: 2 * float(common[k]) / float(sizes[k]) for k, name in names if (before == k).any()}
