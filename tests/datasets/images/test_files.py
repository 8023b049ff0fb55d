"""Scans are read with their true geometry, masks lie on the scan's own grid, bad files are named."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medi3d.datasets.images.files import read_channels, read_volume, write_mask
from medi3d.datasets.images.formats import volumes_among
from medi3d.errors import DataError, ShapeError

RAMP = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def rotation(seed: int) -> np.ndarray:
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix


def affine_of(
    axes: np.ndarray, spacing: tuple[float, ...], origin: tuple[float, ...] = (7, -8, 9)
) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * spacing, origin
    return affine


AFFINES = {
    "identity": np.eye(4),
    "anisotropic": affine_of(np.eye(3), (0.7, 0.8, 5.0)),
    "left-handed": affine_of(np.diag([-1.0, 1.0, 1.0]), (1, 2, 3)),
    "permuted": affine_of(np.eye(3)[[2, 0, 1]], (1, 2, 3)),
    "oblique": affine_of(rotation(1), (1, 2, 3)),
    "oblique-left-handed": affine_of(rotation(1) @ np.diag([1.0, 1.0, -1.0]), (1, 2, 3)),
}
geometries = pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())


def world(image: sitk.Image, index: tuple[int, int, int]) -> np.ndarray:
    return np.array(image.TransformIndexToPhysicalPoint(index))


@geometries
def test_each_nifti_voxel_keeps_value_and_place(affine, write_nifti):
    image = read_volume(write_nifti(RAMP, affine))
    for index in [(0, 0, 0), (3, 0, 0), (0, 4, 0), (0, 0, 5), (2, 3, 4)]:
        assert image[index] == RAMP[index]
        assert world(image, index) == pytest.approx((LPS @ affine @ [*index, 1])[:3], abs=1e-4)


@geometries
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_mask_of_a_nifti_has_its_shape_affine_and_codes(affine, suffix, write_nifti, tmp_path):
    scan = write_nifti(RAMP, affine, f"scan{suffix}")
    mask = sitk.Cast(sitk.Modulus(read_volume(scan), 3), sitk.sitkInt64)
    write_mask(mask, scan, tmp_path / f"mask{suffix}")
    written, source = nib.load(tmp_path / f"mask{suffix}"), nib.load(scan)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), RAMP % 3)
    np.testing.assert_array_equal(written.affine, source.affine)
    assert written.get_data_dtype() == np.uint8
    for code in ("qform_code", "sform_code"):
        assert written.header[code] == source.header[code]
    np.testing.assert_array_equal(written.header.get_qform(), source.header.get_qform())


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii.gz"])
@geometries
def test_mask_in_another_format_lies_in_the_same_place(affine, suffix, write_nifti, tmp_path):
    scan = write_nifti(RAMP, affine)
    image = read_volume(scan)
    write_mask(image > 50, scan, tmp_path / f"mask{suffix}")
    back = read_volume(tmp_path / f"mask{suffix}")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back).T, RAMP > 50)
    assert world(back, (2, 3, 4)) == pytest.approx(world(image, (2, 3, 4)), abs=1e-4)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_itk_formats_agree_with_nifti(suffix, write_nifti, tmp_path):
    image = read_volume(write_nifti(RAMP, AFFINES["oblique"]))
    sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"))
    back = read_volume(tmp_path / f"scan{suffix}")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))
    assert world(back, (2, 3, 4)) == pytest.approx(world(image, (2, 3, 4)), abs=1e-4)


def test_scaling_of_a_nifti_is_applied(tmp_path):
    source = nib.Nifti1Image(RAMP, np.eye(4))
    source.header.set_slope_inter(0.5, -10)
    nib.save(source, tmp_path / "scaled.nii")
    expected = np.asanyarray(nib.load(tmp_path / "scaled.nii").dataobj)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(tmp_path / "scaled.nii")).T, expected)
    assert expected.min() < 0
    write_mask(read_volume(tmp_path / "scaled.nii") > 0, tmp_path / "scaled.nii", tmp_path / "mask.nii")
    np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / "mask.nii").dataobj), expected > 0)


def test_a_mask_takes_no_private_header_over(tmp_path):
    source = nib.Nifti1Image(RAMP, np.eye(4))
    source.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"name of the patient"))
    nib.save(source, tmp_path / "named.nii")
    write_mask(read_volume(tmp_path / "named.nii") > 0, tmp_path / "named.nii", tmp_path / "mask.nii")
    assert b"patient" not in (tmp_path / "mask.nii").read_bytes()


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_mask_takes_no_words_of_the_header_over(kind, tmp_path):
    source = kind(RAMP, np.eye(4))
    fields = ({"descrip", "db_name", "aux_file", "intent_name", "data_type"}) & set(source.header.keys())
    for name in fields:
        source.header[name] = b"JOHN DOE"
    nib.save(source, tmp_path / "named.nii")
    write_mask(read_volume(tmp_path / "named.nii") > 0, tmp_path / "named.nii", tmp_path / "mask.nii")
    assert b"JOHN" in (tmp_path / "named.nii").read_bytes()
    assert b"JOHN" not in (tmp_path / "mask.nii").read_bytes()


def test_a_pair_of_files_is_one_volume_of_a_folder(tmp_path):
    for name in ("a.img", "a.hdr", "b.HDR", "b.IMG", "c.hdr", "d.mgz", ".e.nii", "f.txt", "g.nii.gz"):
        (tmp_path / name).touch()
    found = [path.name for path in volumes_among(tmp_path.iterdir())]
    assert found == ["a.img", "b.IMG", "c.hdr", "d.mgz", "g.nii.gz"]


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_axes_that_rounding_left_askew_are_kept_as_they_are(suffix, write_nifti, tmp_path):
    affine = AFFINES["oblique"].copy()
    affine[:3, 1] += 8e-4 * affine[:3, 0]
    image = read_volume(write_nifti(RAMP, affine))
    assert world(image, (3, 4, 5)) == pytest.approx((LPS @ affine @ [3, 4, 5, 1])[:3], abs=1e-5)
    write_mask(image > 3, tmp_path / "scan.nii.gz", tmp_path / f"mask{suffix}")
    assert world(read_volume(tmp_path / f"mask{suffix}"), (3, 4, 5)) == pytest.approx(
        world(image, (3, 4, 5)), abs=0.02
    )


def test_sform_goes_before_qform_and_both_return_in_the_mask(tmp_path):
    source = nib.Nifti1Image(RAMP, AFFINES["oblique"])
    source.set_qform(AFFINES["anisotropic"], code=1)
    source.set_sform(AFFINES["oblique"], code=2)
    nib.save(source, tmp_path / "two.nii")
    image = read_volume(tmp_path / "two.nii")
    assert world(image, (1, 2, 3)) == pytest.approx((LPS @ AFFINES["oblique"] @ [1, 2, 3, 1])[:3], abs=1e-4)
    write_mask(image > 3, tmp_path / "two.nii", tmp_path / "mask.nii")
    written, source = nib.load(tmp_path / "mask.nii"), nib.load(tmp_path / "two.nii")
    for form in ("get_sform", "get_qform"):
        matrix, code = getattr(written, form)(coded=True)
        expected, expected_code = getattr(source, form)(coded=True)
        np.testing.assert_array_equal(matrix, expected)
        assert code == expected_code


def test_qform_alone_is_used(tmp_path):
    source = nib.Nifti1Image(RAMP, None)
    source.set_qform(AFFINES["oblique"], code=1)
    source.set_sform(None, code=0)
    nib.save(source, tmp_path / "q.nii")
    place = world(read_volume(tmp_path / "q.nii"), (1, 2, 3))
    assert place == pytest.approx((LPS @ AFFINES["oblique"] @ [1, 2, 3, 1])[:3], abs=1e-3)


def test_metres_in_the_header_become_millimetres(tmp_path):
    source = nib.Nifti1Image(RAMP, np.diag([0.001, 0.002, 0.003, 1]))
    source.header.set_xyzt_units("meter")
    nib.save(source, tmp_path / "m.nii")
    assert read_volume(tmp_path / "m.nii").GetSpacing() == pytest.approx((1, 2, 3))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    mirror=st.booleans(),
    spacing=st.tuples(*[st.floats(0.2, 9)] * 3),
    dtype=st.sampled_from(["u1", "i2", ">i2", "f4", "f8", "i8", "u2"]),
)
def test_any_geometry_and_type_makes_the_round_trip(seed, mirror, spacing, dtype, write_nifti, tmp_path):
    axes = rotation(seed) @ np.diag([1.0, 1.0, -1.0 if mirror else 1.0])
    scan = write_nifti(RAMP.astype(dtype), affine_of(axes, spacing), "any.nii")
    mask = read_volume(scan) >= 60
    write_mask(mask, scan, tmp_path / "mask.nii")
    written = nib.load(tmp_path / "mask.nii")
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), RAMP >= 60)
    np.testing.assert_array_equal(written.affine, nib.load(scan).affine)


def test_four_dimensions_are_channels_on_one_grid(write_nifti, tmp_path):
    values = np.stack([RAMP, RAMP + 1], axis=-1)
    scan = write_nifti(values, AFFINES["oblique"])
    first, second = read_channels(scan)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(second) - sitk.GetArrayFromImage(first), 1)
    vectors = sitk.Compose(first, second)
    sitk.WriteImage(vectors, str(tmp_path / "two.nrrd"))
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(read_channels(tmp_path / "two.nrrd")[1]), sitk.GetArrayFromImage(second)
    )
    write_mask(first > 0, scan, tmp_path / "mask.nii")  # a mask of a multi-channel scan is 3D
    assert nib.load(tmp_path / "mask.nii").shape == RAMP.shape


def _damage(tmp_path: Path, case: str) -> Path:
    good = nib.Nifti1Image(np.random.default_rng(0).normal(size=(9, 9, 9)), np.eye(4))
    nib.save(good, tmp_path / "good.nii")
    data = (tmp_path / "good.nii").read_bytes()
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((9, 9, 9), np.int16)), str(tmp_path / "good.mha"))
    files = {
        "empty": ("x.nii.gz", b""),
        "truncated": ("x.nii", data[:2000]),
        "truncated-gz": ("x.nii.gz", gzip.compress(data)[:2000]),
        "header-only": ("x.nii", data[:100]),
        "garbage": ("x.nii.gz", gzip.compress(b"not an image" * 99)),
        "not-gz": ("x.nii.gz", b"not gzip" * 99),
        "nrrd-garbage": ("x.nrrd", b"NRRD0004\nnonsense\n\n"),
        "mha-truncated": ("x.mha", (tmp_path / "good.mha").read_bytes()[:-100]),
        "unknown-format": ("x.jpg", b"\xff\xd8"),
        "single-dicom": ("x.dcm", b"\0" * 128 + b"DICM"),
    }
    name, content = files[case]
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


DAMAGES = ["empty", "truncated", "truncated-gz", "header-only", "garbage", "not-gz"]
DAMAGES += ["nrrd-garbage", "mha-truncated", "unknown-format", "single-dicom"]


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_named_in_one_line(case, tmp_path, capfd):
    path = _damage(tmp_path, case)
    with pytest.raises(DataError, match=path.name) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)
    said = capfd.readouterr().err.splitlines()
    assert all("M_Read" in line or "ideal" in line for line in said)  # ITK's MetaImage cannot be silenced


SHEARED = np.eye(4)
SHEARED[0, 1] = 0.2


@pytest.mark.parametrize(
    ("values", "affine", "word"),
    [
        (RAMP, SHEARED, "sheared"),
        (RAMP, np.diag([1.0, 0.0, 1.0, 1.0]), "greater than 0"),
        (RAMP, np.diag([1.0, np.nan, 1.0, 1.0]), "NaN"),
        (RAMP[0], np.eye(4), "expected a 3D image"),
        (np.stack([RAMP] * 3, axis=-1), np.eye(4), "3 channels or time points"),
        (np.zeros((4, 4, 4, 2, 2), np.float32), np.eye(4), "expected a 3D image"),
        (np.zeros((4, 4, 4), np.complex64), np.eye(4), "plain numbers"),
        (np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4), "colours"),
    ],
    ids=["sheared", "flat", "nan-affine", "2d", "4d", "5d", "complex", "rgb"],
)
def test_what_is_no_volume_is_refused(values, affine, word, tmp_path):
    source = nib.Nifti1Image(values, np.eye(4))
    source.header["sform_code"] = 1
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        source.header[name] = affine[row]
    source = nib.Nifti1Image(values, None, source.header)
    nib.save(source, tmp_path / "odd.nii")
    with pytest.raises(DataError, match=word):
        read_volume(tmp_path / "odd.nii")


def test_a_missing_file_and_a_folder_without_series_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_volume(tmp_path / "none.nii.gz")
    with pytest.raises(DataError, match="no DICOM series"):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [("shape", ShapeError, "shape"), ("place", ShapeError, "mm apart"), ("suffix", DataError, "not as .jpg")],
)
def test_a_mask_that_does_not_fit_is_not_written(change, error, word, write_nifti, tmp_path):
    scan = write_nifti(RAMP, AFFINES["oblique"])
    mask = read_volume(scan) > 3
    if change == "shape":
        mask = mask[:3]
    if change == "place":
        mask.SetOrigin((0, 0, 0))
    out = tmp_path / ("mask.jpg" if change == "suffix" else "mask.nii.gz")
    with pytest.raises(error, match=word):
        write_mask(mask, scan, out)
    assert not out.exists()


def test_a_failed_write_keeps_the_old_mask_and_leaves_no_rest(write_nifti, tmp_path, monkeypatch):
    scan = write_nifti(RAMP)
    out = tmp_path / "out" / "mask.nii.gz"
    write_mask(read_volume(scan) > 3, scan, out)
    before = out.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(DataError, match="disk full"):
        write_mask(read_volume(scan) > 9, scan, out)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["mask.nii.gz"]


def test_many_labels_need_a_wider_type(write_nifti, tmp_path):
    values = RAMP.copy()
    values[0, 0, 0] = 300
    scan = write_nifti(values)
    write_mask(read_volume(scan), scan, tmp_path / "mask.nii")
    np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / "mask.nii").dataobj), values)
