"""Bad input through the command line: one clear line, exit code 1, nothing lost."""

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import CONFIG, write_cohort


@pytest.fixture
def refused(medi3d):
    """Run the command line; gives the line that it ends with."""

    def run(*arguments):
        code, _, err = medi3d(*arguments)
        assert code == 1
        lines = [line for line in err.splitlines() if line.startswith("medi3d: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def damaged(tmp_path):
    """Own cohort to damage: its folder, its config, and the image and label of its first case."""
    root = write_cohort(tmp_path / "cohort", 5)
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(root=root).replace("validation: 3", "validation: 1"))
    return root, config, root / "imagesTr" / "case_0.nii.gz", root / "labelsTr" / "case_0.nii.gz"


def changed(path, change):
    image = nib.load(path)
    array, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.save(nib.Nifti1Image(array, affine), path)


def nan(array, affine):
    array[0, 0, 0] = np.nan
    return array, affine


def moved(array, affine):
    affine[0, 3] += 5
    return array, affine


def of_value_7(array, affine):
    array[0, 0, 0] = 7
    return array, affine


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("image", lambda path: path.unlink(), "case_0.nii.gz: no such file"),
        ("image", lambda path: path.write_bytes(b""), "case_0.nii.gz: the file is empty"),
        ("image", lambda path: path.write_bytes(path.read_bytes()[:500]), "case_0.nii.gz: damaged"),
        ("image", lambda path: changed(path, nan), "case_0.nii.gz: 1 voxels are NaN"),
        (
            "image",
            lambda path: changed(path, lambda a, f: (np.stack([a, a], -1), f)),
            "case_0.nii.gz: a 4D image",
        ),
        (
            "label",
            lambda path: changed(path, lambda a, f: (a[:-1], f)),
            "case_0.nii.gz: the label is not",
        ),
        ("label", lambda path: changed(path, moved), "case_0.nii.gz: the label is not"),
        ("label", lambda path: changed(path, of_value_7), "labelsTr/case_0.nii.gz: label values 7 are not"),
    ],
    ids=["missing", "empty", "truncated", "NaN", "4D", "shape", "affine", "label value"],
)
def test_a_damaged_case_ends_the_training_in_one_line(damaged, refused, tmp_path, which, change, message):
    _, config, image, label = damaged
    change(image if which == "image" else label)
    assert message in refused("train", config, "--runs", tmp_path / "runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainig.steps=3"], "trainig: unknown key"),
        (["training.steps=soon"], "training.steps: Value 'soon'"),
        (["data.validation=5"], "no case is left for training"),
        (["data.root=nowhere"], "nowhere"),
    ],
    ids=["unknown key", "wrong type", "no case", "no cohort"],
)
def test_a_wrong_config_ends_in_one_line(damaged, refused, tmp_path, arguments, message):
    assert message in refused("train", damaged[1], *arguments, "--runs", tmp_path / "runs")


def test_a_folder_that_cannot_be_written_ends_in_one_line(damaged, refused, tmp_path):
    (tmp_path / "runs").touch()
    assert "cannot be written" in refused("train", damaged[1], "--runs", tmp_path / "runs")


@pytest.mark.parametrize("kind", ["missing", "extra", "misshapen"])
def test_weights_that_do_not_fit_end_in_one_line(damaged, refused, tmp_path, kind):
    from medi3d.models.sources import build_source

    tensors = dict(build_source("timm:test_resnet").state_dict())
    key = next(iter(tensors))
    if kind == "missing":
        del tensors[key]
    elif kind == "extra":
        key = "surplus.weight"
        tensors[key] = torch.zeros(3)
    else:
        tensors[key] = torch.zeros(3, 3, 3)
    save_file(tensors, tmp_path / "weights.safetensors")
    source = ["network.source=timm:test_resnet", f"network.weights=file:{tmp_path / 'weights.safetensors'}"]
    line = refused("train", damaged[1], "strategy=full", *source, "--runs", tmp_path / "runs")
    assert key in line


def test_predict_and_evaluate_without_a_run_end_in_one_line(refused, tmp_path):
    assert "no run here" in refused("evaluate", tmp_path)
    assert "no run here" in refused("predict", tmp_path, "scan.nii.gz", "--out", tmp_path)
