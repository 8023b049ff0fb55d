"""The laws of the tree: imports point one way, modules are small and say what they are, no private names."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "medi3d").rglob("*.py"))
LONGEST = 450

LAYERS = {
    "quickstart": {"config", "console", "transfer", "engine", "models", "weights", "datasets"},
    "prepare": {"config", "console", "transfer", "engine", "inflation", "datasets"},
    "config": {"transfer"},
    "transfer": {"engine", "models", "weights", "inflation", "datasets"},
    "engine": {"inflation"},
    "models": {"weights", "inflation"},
    "weights": {"inflation"},
    "inflation": set(),
    "datasets": set(),
}
"""Layer -> layers that it may import, besides itself and what is below all: axes, errors, files."""
BASE = {"axes", "errors", "files", "torchvision_shim"}
TOP = {"cli", "cli_weights", "cli_features", "__main__", "__init__", "console", "doctor", "options"}
"""What stands above all layers: the command line, what it prints, and the names of the package."""


def layer_of(name: str) -> str:
    part = name.split(".")[1] if "." in name else "__init__"
    return "quickstart" if part.startswith("quickstart") else part


def imported(path: Path) -> set[str]:
    """Modules of medi3d that a file imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "medi3d"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    layer = layer_of(name_of(path))
    if layer in TOP:
        return
    allowed = LAYERS.get(layer, set()) | BASE | {layer}
    wrong = {name for name in imported(path) if layer_of(name) not in allowed}
    assert not wrong, f"{layer} may import {sorted(allowed)}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_and_is_small(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= LONGEST


def test_every_layer_is_known() -> None:
    assert {layer_of(name_of(path)) for path in MODULES} == {*LAYERS, *BASE, *TOP}


PRIVATE = {
    "a folder of one machine": r"(?<![\w.])/(work|root|home|opt)/\w",
    "a registry or proxy": r"://[\w.-]*(proxy|mirror|artifactory|nexus|pypi)[\w.-]*[:/]",
    "a secret": r"(?i)(api[_-]?key|secret|passw(or)?d|token)\s*=\s*['\"][^'\"]{8,}",
}


@pytest.mark.parametrize("pattern", PRIVATE.values(), ids=PRIVATE.keys())
def test_no_committed_file_has(pattern: str) -> None:
    found = {}
    for path in tracked():
        if path == Path(__file__):
            continue
        try:
            match = re.search(pattern, path.read_text())
        except UnicodeDecodeError:  # a picture
            continue
        if match:
            found[str(path.relative_to(ROOT))] = match.group()
    assert not found
