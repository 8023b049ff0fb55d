"""Augmentation keeps image and label together, keeps shapes in millimetres, and repeats by seed."""

import pickle
from dataclasses import replace

import pytest
import torch

from medi3d.datasets.sampling.augmentation import PROBABILITIES, AugmentationSettings, build_augmentation
from medi3d.errors import ConfigError

OFF = AugmentationSettings(**dict.fromkeys(PROBABILITIES, 0.0))
SPACING = (3.0, 1.0, 1.5)


def ball(shape: tuple[int, int, int], spacing=SPACING, radius: float = 12.0) -> dict:
    """A bright ball of `radius` mm in air (-1), labelled 2."""
    axes = [(torch.arange(n) - (n - 1) / 2) * side for n, side in zip(shape, spacing, strict=True)]
    distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
    inside = (distance < radius)[None]
    return {
        "image": inside * 1.6 - 1.0,
        "label": inside.to(torch.uint8) * 2,
        "name": "ball",
        "spacing": spacing,
    }


def dice(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def test_all_switched_off_is_the_identity():
    sample = ball((12, 30, 24))
    changed = build_augmentation(OFF)(sample)
    torch.testing.assert_close(changed["image"], sample["image"])
    torch.testing.assert_close(changed["label"], sample["label"])
    assert (changed["name"], changed["spacing"]) == ("ball", SPACING)


def test_a_rotated_ball_is_the_same_ball_where_voxels_are_not_cubes():
    """Fails if an axis is mistaken for another, or if voxels are taken for millimetres."""
    sample = ball((16, 40, 30))
    rotate = build_augmentation(replace(OFF, affine=1.0, rotation=90.0, scale=0.0))
    for _ in range(5):
        changed = rotate(sample)
        assert dice(changed["image"] > -0.2, sample["label"] > 0) > 0.93
        assert not torch.equal(changed["label"], sample["label"])


@pytest.mark.parametrize("change", ["affine", "elastic"])
def test_image_and_label_move_together(change):
    sample = ball((16, 44, 32))
    sample["image"][:, :, :20] = sample["label"][:, :, :20] = 0  # half a ball, so that turns show
    sample["image"] = sample["label"].float()
    augment = build_augmentation(replace(OFF, **{change: 1.0}, displacement=4.0))
    changed = augment(sample)
    assert dice(changed["image"] > 1, changed["label"] > 0) > 0.999  # nearest neighbour: 0.97
    assert dice(changed["label"] > 0, sample["label"] > 0) < 0.99
    assert changed["label"].unique().tolist() == [0, 2]


@pytest.mark.parametrize(
    ("axis", "dimension"), [("left-right", 3), ("anterior-posterior", 2), ("inferior-superior", 1)]
)
def test_a_flip_mirrors_the_axis_that_it_names(axis, dimension):
    sample = {"image": torch.rand(2, 3, 4, 5), "label": torch.randint(0, 3, (1, 3, 4, 5), dtype=torch.uint8)}
    changed = build_augmentation(replace(OFF, flip=1.0, flip_axes=[axis]))(sample)
    torch.testing.assert_close(changed["image"], sample["image"].flip(dimension))
    torch.testing.assert_close(changed["label"], sample["label"].flip(dimension))


@pytest.mark.parametrize("change", ["affine", "elastic"])
def test_in_plane_no_voxel_changes_its_slice(change):
    height = torch.arange(9.0)[None, :, None, None].expand(1, 9, 40, 40)  # the number of the slice
    augment = build_augmentation(replace(OFF, **{change: 1.0}, in_plane=True))
    changed = augment({"image": height + 0.0, "spacing": SPACING})["image"]
    inner = changed[:, :, 12:28, 12:28]  # what came from beyond the border has its mean
    torch.testing.assert_close(inner, height[:, :, 12:28, 12:28], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("axis", "expected"), [("left-right", [0, 1, 3, 2]), ("inferior-superior", [0, 1, 2, 3])]
)
def test_a_left_organ_is_a_right_one_after_left_and_right_changed(axis, expected):
    label = torch.arange(4, dtype=torch.uint8).expand(1, 5, 6, 4)
    flip = build_augmentation(replace(OFF, flip=1.0, flip_axes=[axis]), swaps=[(2, 3)])
    changed = flip({"image": label.float(), "label": label})
    image = changed["image"].to(torch.uint8)  # mirrored too, but its voxels do not change their name
    torch.testing.assert_close(changed["label"], torch.tensor(expected, dtype=torch.uint8)[image.long()])


def test_bodies_are_not_mirrored_unless_asked():
    sample = ball((8, 9, 10))
    torch.testing.assert_close(build_augmentation(replace(OFF, flip=1.0))(sample)["image"], sample["image"])


@pytest.mark.parametrize("change", ["gamma", "bias_field", "blur", "noise"])
def test_intensity_changes_leave_the_label_alone(change):
    sample = ball((8, 20, 16))
    sample["image"] += 0.2 * torch.rand(1, 8, 20, 16)
    changed = build_augmentation(replace(OFF, **{change: 1.0}))(sample)
    assert not torch.equal(changed["image"], sample["image"])
    torch.testing.assert_close(changed["label"], sample["label"])
    assert changed["image"].isfinite().all()


@pytest.mark.parametrize("change", ["gamma", "bias_field"])
def test_air_stays_air_and_order_is_kept(change):
    image = torch.linspace(-1, 1, 9 * 8 * 8).reshape(1, 9, 8, 8)
    changed = build_augmentation(replace(OFF, **{change: 1.0}))({"image": image})["image"]
    assert changed.flatten()[0] == -1
    assert changed.min() == -1
    if change == "gamma":
        assert (changed.flatten().diff() > 0).all()


def test_each_channel_and_sizes_that_are_all_different_keep_their_place():
    image = torch.zeros(2, 7, 9, 11)
    image[0, 1, 2, 3] = image[1, 5, 6, 7] = 1
    changed = build_augmentation(replace(OFF, noise=1.0, noise_std=0.01))({"image": image})["image"]
    assert changed.shape == image.shape
    torch.testing.assert_close(changed.round(), image)


def test_the_same_seed_gives_the_same_sample_and_the_input_stays():
    every = replace(OFF, **dict.fromkeys(PROBABILITIES, 1.0), flip_axes=["anterior-posterior"])
    augment, sample, untouched = build_augmentation(every), ball((10, 24, 18)), ball((10, 24, 18))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(sample)["image"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.testing.assert_close(sample["image"], untouched["image"])
    torch.testing.assert_close(sample["label"], untouched["label"])


def test_workers_can_receive_it():
    augment = pickle.loads(pickle.dumps(build_augmentation(AugmentationSettings())))
    assert augment(ball((8, 9, 10)))["image"].shape == (1, 8, 9, 10)


@pytest.mark.parametrize(
    ("keywords", "key"),
    [
        ({"affine": 1.5}, "affine"),
        ({"noise": -0.1}, "noise"),
        ({"rotation": -5.0}, "rotation"),
        ({"scale": 1.0}, "scale"),
        ({"flip_axes": ["up-down"]}, "flip_axes"),
    ],
    ids=lambda value: str(value),
)
def test_settings_that_make_no_sense_are_refused_by_key(keywords, key):
    with pytest.raises(ConfigError, match=rf"augmentation\.{key}"):
        AugmentationSettings(**keywords)


def test_settings_survive_omegaconf():
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(AugmentationSettings), {"flip_axes": ["left-right"]})
    assert OmegaConf.to_object(merged) == AugmentationSettings(flip_axes=["left-right"])


def test_one_map_of_many_is_argmax():
    from medi3d.datasets.sampling.augmentation import _arg_max

    maps = (torch.rand(5, 6, 7, 8) * 4).round() / 4  # with ties
    import torchio as tio

    subject = tio.Subject(label=tio.LabelMap(tensor=maps))
    values = [0, 2, 3, 7, 9]
    _arg_max(subject, values)
    assert torch.equal(subject["label"].data[0].long(), torch.tensor(values)[maps.argmax(0)])


@pytest.mark.parametrize("labels", [(1, 2), (3, 250)], ids=str)
def test_labels_keep_their_numbers_when_they_are_turned(labels):
    label = torch.zeros(1, 12, 12, 12, dtype=torch.uint8)
    label[:, 2:10, 2:6], label[:, 2:10, 6:10] = labels
    still = AugmentationSettings(affine=1.0, rotation=0.0, scale=0.0, gamma=0.0, noise=0.0)
    changed = build_augmentation(still)({"image": label.float(), "label": label})
    assert torch.equal(changed["label"], label)


def test_so_many_samples_are_turned_as_asked():
    image = torch.arange(1000.0).view(1, 10, 10, 10)
    augment = build_augmentation(AugmentationSettings(affine=0.3, gamma=0.0, noise=0.0))
    torch.manual_seed(0)
    turned = sum(not torch.equal(augment({"image": image})["image"], image) for _ in range(200))
    assert 40 <= turned <= 80  # 60 on the mean, standard deviation 6.5
