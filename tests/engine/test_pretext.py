"""The pretext tasks: what counts in their loss and scores."""

import pytest
import torch

from medi3d.engine.pretext import (
    PretextSettings,
    group_numbers,
    pretext,
    restoration_loss,
    restoration_scores,
)
from medi3d.errors import ConfigError


def target_of(volume, counts):
    return torch.cat([volume, counts], dim=1)


@pytest.fixture
def volume():
    return torch.randn(2, 3, 4, 5, 6)


def test_only_masked_voxels_count(volume):
    counts = (torch.rand(2, 1, 4, 5, 6) < 0.5).float()
    answer = torch.where(counts.bool(), volume, 9.0)
    assert restoration_loss(answer, target_of(volume, counts)) == 0
    assert [row["explained"] for row in restoration_scores(answer, target_of(volume, counts))] == [1, 1]
    answer.requires_grad_()
    restoration_loss(answer + counts, target_of(volume, counts)).backward()
    assert torch.equal(answer.grad != 0, counts.bool().expand_as(answer))


def test_loss_is_the_mean_square_over_what_counts(volume):
    counts = torch.zeros(2, 1, 4, 5, 6)
    counts[0, :, 1] = 1
    other = torch.randn_like(volume)
    expected = torch.nn.functional.mse_loss(other[0, :, 1], volume[0, :, 1])
    assert restoration_loss(other, target_of(volume, counts)) == pytest.approx(float(expected), rel=1e-5)


def test_the_mean_explains_nothing(volume):
    mean = volume.mean(dim=(2, 3, 4), keepdim=True).expand_as(volume)
    for row in restoration_scores(mean, target_of(volume, torch.ones(2, 1, 4, 5, 6))):
        assert row["explained"] == pytest.approx(0, abs=1e-5)


def test_tasks_of_each_kind():
    assert pretext(PretextSettings("masked"), 2, (4, 4, 4)).classes == ("channel 0", "channel 1")
    synthetic = pretext(PretextSettings("synthetic", labels={"a": [1], "b": [2, 5]}), 1, (4, 4, 4))
    assert synthetic.classes == ("background", "a", "b")
    assert synthetic.score == "dice"


def test_labels_become_groups():
    assert group_numbers({"a": [17, 53], "b": [530]}, [0, 17, 2, 53, 530]) == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "colour"}, "pretext.kind is 'colour'"),
        ({"share": 1.5}, "pretext.share is 1.5"),
        ({"cube": 0}, "pretext.cube is 0"),
        ({"kind": "synthetic"}, "pretext.labels is empty"),
        ({"labels": {"a": [1], "b": [1]}}, "names a value twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ConfigError, match=message):
        PretextSettings(**wrong)
