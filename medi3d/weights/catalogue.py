"""The published weights that medi3d knows: one row each, the file's location, and how it is fetched.

`MEDI3D_WEIGHTS_PATH` (folders, separated by ":", searched with their subfolders) comes first, then the
cache (`MEDI3D_CACHE` or `~/.cache/medi3d`), then an installed package that carries the file. A file is used
only if its SHA-256 is the published one.
"""

import difflib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from medi3d.errors import WeightsError
from medi3d.files import file_sha256
from medi3d.weights.files import read_metadata, read_weights
from medi3d.weights.hub import PREFIX, find_on_hub
from medi3d.weights.rows import ROWS, InputContract, WeightsRow


def list_weights() -> list[WeightsRow]:
    """Every row of the catalogue."""
    return list(ROWS)


def get_row(name: str) -> WeightsRow:
    """The row of that name; for `file:PATH[#PART]` and `hf:ORG/NAME` one for that file.

    Raises:
        WeightsError: there is none (the message lists similar names), or the file cannot be read.
    """
    if name.startswith("file:"):
        path, part = split_part(name.removeprefix("file:"))
        return row_of(name, path, part)
    if name.startswith(PREFIX):
        return _row_of_hub(name)
    names = {row.name: row for row in ROWS}
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or list(names)
        raise WeightsError(
            f"unknown weights {name!r}: did you mean {', '.join(near)}, or file:PATH, hf:ORG/NAME?"
        )
    return names[name]


def _row_of_hub(name: str) -> WeightsRow:
    name, _, part = name.partition("#")
    found = find_on_hub(name)
    return row_of(
        found.name,
        str(found.path),
        part,
        description="a file of a repository on the hub",
        licence=found.licence,
        url=found.name,
        **({"contract": found.contract} if found.contract else {}),
    )


def split_part(text: str) -> tuple[str, str]:
    """`PATH#PART` -> the path and the part; a file whose own name has a "#" is taken first."""
    path, mark, part = text.rpartition("#")
    return (path, part) if mark and not Path(text).is_file() else (text, "")


def row_of(name: str, path: str, part: str, **facts: Any) -> WeightsRow:
    """A row for a file, with the description in the file.

    Raises:
        WeightsError: the file cannot be read.
    """
    kernels = [t.shape for t in read_weights(path, part).tensors.values() if t.dim() in (4, 5)]
    described = _description(path)
    return WeightsRow(
        **{
            "name": name,
            "source": "any",
            "description": "a file of yours",
            "licence": "unknown",
            "paper": "unknown",
            "dimensions": 3 if any(len(shape) == 5 for shape in kernels) else 2,
            "channels": kernels[0][1] if kernels else None,
            "contract": _contract_of(described),
            "file": path,
            "part": part,
            "origin_licences": tuple(described.get("licences") or ()),
            **facts,
        }
    )


def _description(path: str) -> dict[str, Any]:
    """The weights' description in a medi3d artifact; other files have none."""
    try:
        weights = json.loads(read_metadata(path).get("medi3d", "{}")).get("weights", {})
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{path}: its description is damaged ({error})") from error
    return weights if isinstance(weights, dict) else {}


def _contract_of(described: Mapping[str, Any]) -> InputContract | None:
    contract = described.get("contract")
    if contract is None:
        return None
    mean, std = tuple(contract["mean"]), tuple(contract["std"])
    return InputContract(mean, std, contract["channels"], contract["size"])


def read_classes(row: WeightsRow) -> list[str]:
    """Class names in the order of the logits.

    Raises:
        WeightsError: the row's network has no published classes.
    """
    if row.classes is None:
        raise WeightsError(f"weights {row.name} come without class names")
    text = resources.files("medi3d.weights").joinpath(row.classes).read_text()
    return [line for line in text.splitlines() if not line.startswith("#")]


def find_weights(row: WeightsRow) -> Path:
    """Path of the row's file on this machine.

    Raises:
        WeightsError: it is missing, or the file under its name is a different one.
    """
    if row.file is None:
        raise WeightsError(f"weights {row.name} have no file here: {row.description}")
    if row.name.startswith(("file:", PREFIX)):
        return Path(row.file)
    wrong = []
    for path in [*_on_weights_path(row.file), cached_path(row), *_in_package(row)]:
        if not path.is_file():
            continue
        # Files in the cache were verified before they were converted to .safetensors.
        if path.name != Path(row.file).name or row.sha256 in (None, file_sha256(path)):
            return path
        wrong.append(path)
    if wrong:
        raise WeightsError(
            f"{wrong[0]}: not the published file of {row.name}: its SHA-256 is not {row.sha256}"
        )
    hint = f"run `medi3d weights fetch {row.name}`" if row.package else f"it is published at {row.url}"
    raise WeightsError(
        f"weights {row.name} are not on this machine: {hint}, or put {row.file} on MEDI3D_WEIGHTS_PATH"
    )


def cached_path(row: WeightsRow) -> Path:
    """Where `fetch_weights` keeps the row: as `.safetensors`, under the published tensor names."""
    assert row.file is not None
    cache = Path(os.environ.get("MEDI3D_CACHE") or Path.home() / ".cache" / "medi3d")
    return (cache / "weights" / row.name / row.file).with_suffix(".safetensors")


def _on_weights_path(file: str) -> list[Path]:
    folders = [Path(f) for f in os.environ.get("MEDI3D_WEIGHTS_PATH", "").split(os.pathsep) if f]
    return [path for folder in folders for path in sorted(folder.rglob(file))]


def _in_package(row: WeightsRow) -> list[Path]:
    if row.package is None:
        return []
    try:
        installed = importlib.metadata.distribution(row.package.name)
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(installed.locate_file(f))) for f in installed.files or [] if f.name == row.file]
