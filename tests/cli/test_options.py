"""What the commands share: texts to values, and JSON that any reader takes."""

import json

import pytest
import typer

from medi3d.cli.options import triple, whole_triple, write_json
from medi3d.errors import Medi3dError


def test_json_is_strict_and_leaves_no_other_file(tmp_path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    write_json(tmp_path / "new" / "r.json", {"worst": float("inf"), "levels": [float("nan"), 1.5]})
    text = (tmp_path / "new" / "r.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {"worst": None, "levels": [None, 1.5]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


def test_a_place_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Medi3dError, match="cannot be written"):
        write_json(tmp_path / "file" / "r.json", {})


@pytest.mark.parametrize("text", ["1,2", "a,b,c", "1,2,3,4", ""])
def test_texts_that_are_no_triple_are_refused(text):
    with pytest.raises(typer.BadParameter, match="such as 5,1,1"):
        triple(text)
    with pytest.raises(typer.BadParameter, match="--size"):
        whole_triple(text, "--size")
