"""Masks lie on the grid of the scan, whatever it is; a scan that fails does not stop the others."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from medi3d.datasets.volumes import VolumeSettings
from medi3d.engine.inference import single_forward
from medi3d.engine.precision import Precision
from medi3d.errors import ConfigError
from medi3d.transfer.prediction import Predictor, predict_files


class Threshold(nn.Module):
    """Class 1 where the normalised image is positive: brighter than the middle of its percentiles."""

    def forward(self, x):
        return torch.cat([-x, x], dim=1)


PREDICTOR = Predictor(None, Threshold(), single_forward, Precision(torch.device("cpu"), bf16=False))
MR = VolumeSettings(root="", modality="MR", labels={"bright": 1})


def bright(array):
    """The threshold network by hand."""
    low, high = np.percentile(array, [0.5, 99.5])
    return np.clip((array.astype(np.float64) - low) * (2 / (high - low)) - 1, -1, 1).astype(np.float32) > 0


@pytest.fixture
def oblique(tmp_path):
    """Anisotropic, turned about two axes, left-handed, its slices along the first axis."""
    turn = np.array([[0.96, -0.25, 0.1], [0.24, 0.966, 0.08], [-0.117, -0.053, 0.992]])
    turn = np.linalg.qr(turn)[0][:, [2, 0, 1]] * [1, -1, 1]
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([6.5, 0.7, 0.7])
    affine[:3, 3] = (-41.5, 13.25, 7.125)
    array = np.random.default_rng(0).normal(size=(9, 20, 24)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_a_mask_of_an_oblique_nifti_lies_on_its_grid(oblique, tmp_path):
    (written,), failed = predict_files(PREDICTOR, MR, [oblique], tmp_path / "masks")
    scan, mask = nib.load(oblique), nib.load(written)
    assert not failed
    assert mask.shape == scan.shape
    assert np.array_equal(mask.affine, scan.affine)
    assert np.array_equal(np.asarray(mask.dataobj), bright(np.asarray(scan.dataobj)))


def test_a_resampled_prediction_comes_back_to_the_grid(oblique, tmp_path):
    settings = dataclasses.replace(MR, spacing=[2.0, 1.5, 1.5])
    (written,), failed = predict_files(PREDICTOR, settings, [oblique], tmp_path / "masks")
    scan, mask = nib.load(oblique), nib.load(written)
    assert not failed
    assert mask.shape == scan.shape
    assert np.array_equal(mask.affine, scan.affine)


@pytest.mark.parametrize("study", ["Study3/11-T1post-18670", "Study3/11_HCropVolume"])
def test_a_mask_of_a_dicom_series_lies_on_its_grid(shared, tmp_path, study):
    series = shared / "dicom" / "udacity_TestVolumes" / study
    (written,), failed = predict_files(PREDICTOR, MR, [series], tmp_path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    scan, mask = reader.Execute(), sitk.ReadImage(written)
    assert not failed
    assert mask.GetSize() == scan.GetSize()
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, name)(), getattr(scan, name)(), atol=1e-4)
    assert np.array_equal(sitk.GetArrayFromImage(mask), bright(sitk.GetArrayFromImage(scan)))


def test_a_scan_that_fails_does_not_stop_the_others(oblique, tmp_path):
    empty = tmp_path / "empty.nii.gz"
    empty.touch()
    written, failed = predict_files(
        PREDICTOR, MR, [empty, tmp_path / "none.mha", oblique], tmp_path / "masks"
    )
    assert [path.name for path in written] == ["scan.nii.gz"]
    assert [line.count("\n") for line in failed] == [0, 0]
    assert "empty" in failed[0]
    assert "no such file" in failed[1]


def test_scans_of_one_name_are_kept_apart(oblique, tmp_path):
    twin = tmp_path / "other" / "scan.nii.gz"
    twin.parent.mkdir()
    twin.write_bytes(oblique.read_bytes())
    written, _ = predict_files(PREDICTOR, MR, [oblique, twin], tmp_path / "masks")
    assert [path.name for path in written] == [f"{tmp_path.name}_scan.nii.gz", "other_scan.nii.gz"]


def test_a_scan_is_not_replaced_by_its_mask(oblique):
    with pytest.raises(ConfigError, match="would replace the scan"):
        predict_files(PREDICTOR, MR, [oblique], oblique.parent)
