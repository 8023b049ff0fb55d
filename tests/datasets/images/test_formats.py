"""What decides the content of an image: its file, and the files in which its header says that voxels are."""

import pytest

from medi3d.datasets.images.formats import content_files
from medi3d.errors import DataError

MHD = "ObjectType = Image\nNDims = 3\nElementDataFile = {}\n"
NHDR = "NRRD0004\ndimension: 3\nencoding: raw\ndata file: {}\n"


@pytest.mark.parametrize(
    ("name", "header", "voxels"),
    [
        ("a.mhd", MHD.format("a.raw"), ["a.raw"]),
        ("a.mhd", MHD.format("LOCAL"), []),
        ("a.mhd", MHD.format("LIST\na1.raw\na2.raw"), ["a1.raw", "a2.raw"]),
        ("a.mhd", MHD.format("a%02d.raw 1 2 1"), ["a01.raw", "a02.raw"]),
        ("a.mhd", MHD.format("with blank.raw"), ["with blank.raw"]),
        ("a.nhdr", NHDR.format("a.raw.gz"), ["a.raw.gz"]),
        ("a.nhdr", NHDR.format("LIST\na1.raw\na2.raw"), ["a1.raw", "a2.raw"]),
        ("a.nhdr", NHDR.replace("data file", "datafile").format("./a.raw")[:-8] + "a.raw\n", ["a.raw"]),
        ("a.hdr", "", ["a.img"]),
        ("a.nrrd", NHDR.format("a.raw"), []),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 8 else None,
)
def test_detached_voxels_belong_to_the_content(tmp_path, name, header, voxels):
    (tmp_path / name).write_text(header)
    for voxel in voxels:
        (tmp_path / voxel).touch()
    assert content_files(tmp_path / name) == [tmp_path / name, *(tmp_path / voxel for voxel in voxels)]


@pytest.mark.parametrize("place", ["/etc/services", "../other.raw", "sub/a.raw"])
def test_voxels_outside_of_the_folder_are_refused(tmp_path, place):
    (tmp_path / "a.mhd").write_text(MHD.format(place))
    with pytest.raises(DataError, match="must be in the header's folder"):
        content_files(tmp_path / "a.mhd")
