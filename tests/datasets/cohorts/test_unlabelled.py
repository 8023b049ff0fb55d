"""Which volumes are pretrained on, and what is read of volumes and label maps."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from medi3d.datasets.cohorts.unlabelled import (
    UnlabelledCohort,
    UnlabelledSettings,
    file_fingerprint,
    list_volumes,
    load_map,
    load_volume,
)
from medi3d.datasets.sampling.augmentation import AugmentationSettings
from medi3d.datasets.sampling.patches import cut_patch
from medi3d.datasets.sampling.synthesis import build_synthesis
from medi3d.errors import ConfigError, DataError


def write(path, array):
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0])), path)
    return path


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    label = np.zeros((10, 12, 14), np.int16)
    label[3:6, 4:9, 2:6], label[6:8, 4:9, 2:6] = 530, 17
    write(tmp_path / "a.nii.gz", rng.normal(size=label.shape).astype(np.float32))
    write(tmp_path / "b.nii.gz", label)
    return tmp_path


def volumes(settings, **options):
    return list_volumes(settings, **{"channels": 1, "maps": False, "excluded": {}} | options)


def names(settings, **options):
    return [volume.name for volume in volumes(settings, **options)]


def settings_of(*roots):
    return UnlabelledSettings([UnlabelledCohort(str(root)) for root in roots], patch=[4, 4, 4])


def test_a_folder_and_a_file_are_cohorts(folder):
    settings = settings_of(folder, folder / "a.nii.gz")
    assert set(names(settings)) == {f"{folder.name}/a", f"{folder.name}/b", "a.nii.gz/a"}
    left = names(settings, excluded={0: [folder / "a.nii.gz"]})
    assert set(left) == {f"{folder.name}/b", "a.nii.gz/a"}
    with pytest.raises(DataError, match="no case is left"):
        names(settings_of(folder / "a.nii.gz"), excluded={0: [folder / "a.nii.gz"]})


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no dataset.json and no image file"):
        names(settings_of(tmp_path))


def test_a_list_gives_its_training_cases_and_each_channel_for_itself(folder):
    both = ["a.nii.gz", "b.nii.gz"]
    rows = [{"image": both, "name": "x", "split": "training"}, {"image": both, "name": "y", "split": "test"}]
    (folder / "list.json").write_text(json.dumps(rows))
    settings = settings_of(folder / "list.json")
    assert names(settings) == ["list.json/x#0", "list.json/x#1"]
    assert names(settings, channels=2) == ["list.json/x"]


def test_a_volume_is_normalised_and_knows_where_there_is_something(folder):
    settings = settings_of(folder)
    sample = load_volume(volumes(settings)[0], settings, 1)
    assert sample["image"].shape == (1, 14, 12, 10)
    assert sample["image"].abs().max() <= 1
    values = sample["image"][0][tuple(sample["centres"].long().T)]
    assert (values > sample["image"].mean()).all()


def test_a_map_is_numbered_and_cut(folder):
    settings = settings_of(folder / "b.nii.gz")
    sample = load_map(volumes(settings, maps=True)[0], settings)
    assert sample["values"].tolist() == [0, 17, 530]
    assert sample["label"].shape == (1, 4, 5, 5)
    assert sample["label"].unique().tolist() == [1, 2]
    assert sample["spacing"] == (2, 1, 1)
    assert set(sample["label"][0][tuple(sample["centres"].long().T)].tolist()) == {1, 2}


def test_an_image_is_no_map(folder):
    settings = settings_of(folder / "a.nii.gz")
    with pytest.raises(DataError, match="other than whole numbers"):
        load_map(volumes(settings, maps=True)[0], settings)


def test_a_patch_lies_around_its_centre_and_beyond_the_border_nothing_is_labelled():
    image = torch.arange(6.0 * 6 * 6).view(1, 6, 6, 6)
    patch = cut_patch({"image": image, "label": torch.ones(1, 6, 6, 6)}, (3, 3, 9), (3, 0, 1))
    assert torch.equal(patch["image"][0, :, :, 3:], image[0, 2:5, :3])
    assert torch.equal(patch["label"].sum(dim=(0, 1, 2)), torch.tensor([0.0] * 3 + [9.0] * 6))


def test_drawn_images_follow_their_labels():
    label = torch.zeros(1, 12, 12, 12, dtype=torch.uint8)
    label[:, 3:9, 3:9, 3:9] = 4
    still = AugmentationSettings(affine=0.0, gamma=0.0, noise=0.0)
    image, moved = build_synthesis(still)({"label": label, "spacing": (1, 1, 1)})
    assert torch.equal(moved, label)
    assert image.abs().max() <= 1
    inside, outside = image[label == 4], image[label == 0]
    assert abs(inside.mean() - outside.mean()) > 2 * min(inside.std(), outside.std())
    turned = AugmentationSettings(affine=1.0, rotation=40.0, gamma=0.0, noise=0.0)
    image, moved = build_synthesis(turned)({"label": label, "spacing": (1, 1, 1)})
    assert set(moved.unique().tolist()) == {0, 4}
    assert not torch.equal(moved, label)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="cohorts is empty"):
        UnlabelledSettings([])
    with pytest.raises(ConfigError, match="repeat is 0"):
        UnlabelledCohort("x", repeat=0)


def test_a_fingerprint_is_of_the_content(folder, tmp_path):
    copy = tmp_path / "copy.nii.gz"
    copy.write_bytes((folder / "a.nii.gz").read_bytes())
    assert file_fingerprint(copy) == file_fingerprint(folder / "a.nii.gz") != file_fingerprint(folder)
