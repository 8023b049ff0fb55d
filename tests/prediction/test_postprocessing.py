"""Only the largest component, of the labels for which validation showed a gain, stored in the run."""

import numpy as np
import pytest

from medi3d.errors import ConfigError
from medi3d.prediction.postprocessing import decide, keep_largest, read_largest, write_largest


def test_only_the_named_labels_lose_their_smaller_parts():
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[0:2, 0:2, 0:2] = mask[5, 5, 5] = 1
    mask[0, 4:6, 0] = mask[3, 3, 3] = 2
    expected = mask.copy()
    expected[5, 5, 5] = 0
    keep_largest(mask, [1, 3])
    np.testing.assert_array_equal(mask, expected)


def test_voxels_that_share_a_corner_are_one_part():
    mask = np.zeros((3, 3, 3), np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 2] = 1
    keep_largest(mask, [1])
    assert mask.sum() == 3


def test_a_label_is_chosen_when_its_mean_dice_gains():
    rows = [
        {"label": label, "dice": 0.8, "dice_largest": 0.8 + gain}
        for label, gains in {"better": (0.1, -0.05), "worse": (0.05, -0.1), "same": (0, 0)}.items()
        for gain in gains
    ]
    assert decide(rows) == ["better"]


def test_the_decision_is_kept_in_the_run(tmp_path):
    path = tmp_path / "postprocessing.json"
    assert read_largest(path) == []
    write_largest(path, ["a"])
    assert read_largest(path) == ["a"]
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"postprocessing\.json"):
        read_largest(path)
