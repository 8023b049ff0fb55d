"""Patches have the size asked for, show the volume as it is, and find what is labelled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medi3d.datasets.sampling.patches import sample_patch
from medi3d.errors import ConfigError, ShapeError

sizes = st.tuples(*[st.integers(1, 9)] * 3)


def sample_of(shape: tuple[int, ...]) -> dict:
    """Voxel values tell where they come from; everything is labelled."""
    image = 1 + torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(1, *shape)
    return {"image": image, "label": torch.ones(1, *shape, dtype=torch.uint8), "name": "a"}


@settings(max_examples=60, deadline=None)
@given(shape=sizes, size=sizes, foreground=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99))
def test_any_patch_of_any_volume(shape, size, foreground, seed):
    torch.manual_seed(seed)
    sample = sample_of(shape)
    patch = sample_patch(sample, size, foreground)
    assert patch["image"].shape == patch["label"].shape == (1, *size)
    inside = patch["label"][0].bool()
    assert inside.sum() == torch.tensor([min(n, s) for n, s in zip(shape, size, strict=True)]).prod()
    seen = patch["image"][0][inside]
    assert len(seen.unique()) == len(seen)  # no voxel of the volume twice
    assert torch.isin(patch["image"], sample["image"]).all()  # beyond it: its border voxels
    assert patch["name"] == "a"


def test_a_small_volume_is_continued_by_its_border():
    sample = {"image": torch.tensor([[[[5.0, 7.0]]]]), "label": torch.tensor([[[[1, 2]]]], dtype=torch.uint8)}
    for _ in range(9):
        patch = sample_patch(sample, (1, 1, 4), 0.0)
        image, label = patch["image"].flatten().tolist(), patch["label"].flatten().tolist()
        first = label.index(1)
        assert image == [5.0] * (first + 1) + [7.0] * (3 - first)
        assert label == [0] * first + [1, 2] + [0] * (2 - first)


def test_foreground_finds_each_label_though_one_is_rare():
    label = torch.zeros(1, 30, 30, 30, dtype=torch.uint8)
    label[0, :10] = 1
    label[0, 25, 3, 28] = 2
    sample = {"image": torch.zeros(1, 30, 30, 30), "label": label}
    found = [bool((sample_patch(sample, (3, 3, 3), 1.0)["label"] == 2).any()) for _ in range(60)]
    assert 15 <= sum(found) <= 45  # half of them; blind chance would find it once in 800
    blind = [bool((sample_patch(sample, (3, 3, 3), 0.0)["label"] == 2).any()) for _ in range(60)]
    assert sum(blind) <= 2


def test_a_patch_is_centred_on_the_labelled_voxel():
    label = torch.zeros(1, 20, 20, 20, dtype=torch.uint8)
    label[0, 9, 10, 11] = 1
    patch = sample_patch({"image": label.float(), "label": label}, (5, 5, 5), 1.0)
    assert patch["label"][0, 2, 2, 2] == 1


def test_random_patches_reach_every_place():
    starts = {int(sample_patch(sample_of((6, 1, 1)), (2, 1, 1), 0.0)["image"][0, 0, 0, 0]) for _ in range(99)}
    assert starts == {1, 2, 3, 4, 5}


def test_the_same_seed_gives_the_same_patch():
    sample = sample_of((20, 20, 20))
    patches = []
    for _ in range(2):
        torch.manual_seed(5)
        patches.append(sample_patch(sample, (4, 5, 6), 0.5)["image"])
    torch.testing.assert_close(*patches)


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_without_labelled_voxels_or_label_any_place_will_do(foreground):
    sample = sample_of((5, 6, 7))
    sample["label"].zero_()
    assert sample_patch(sample, (3, 3, 3), foreground)["label"].sum() == 0
    del sample["label"]
    assert "label" not in sample_patch(sample, (3, 3, 3), foreground)


def test_the_volume_itself_is_not_changed():
    sample, same = sample_of((5, 5, 5)), sample_of((5, 5, 5))
    sample_patch(sample, (5, 5, 5), 1.0)["image"].zero_()
    torch.testing.assert_close(sample["image"], same["image"])


@pytest.mark.parametrize(
    ("shape", "size", "foreground", "error", "word"),
    [
        ((5, 5), (3, 3, 3), 0.0, ShapeError, r"\(C, D, H, W\)"),
        ((5, 5, 5), (3, 3), 0.0, ShapeError, "patch size"),
        ((5, 5, 5), (3, 3, 3), 2.0, ConfigError, "foreground is 2.0"),
    ],
    ids=["image", "size", "foreground"],
)
def test_what_makes_no_sense_is_refused(shape, size, foreground, error, word):
    with pytest.raises(error, match=word):
        sample_patch({"image": torch.zeros(1, *shape)}, size, foreground)
