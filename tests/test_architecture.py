"""The laws of the tree: imports point one way, modules are small and say what they are, no private names."""

import ast
import graphlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "medi3d").rglob("*.py"))
LONGEST = 450

ROOMS = (
    {"cli"},
    {"comparison", "export"},
    {"training"},
    {"evaluation"},
    {"planning", "prediction", "reports"},
    {"experiment"},
    {"models"},
    {"weights"},
    {"datasets", "engine", "inflation"},
    {"axes"},
    {"console", "errors", "files", "keys", "onednn", "processes", "torchvision_shim"},
)
"""From the top: a room may import itself and the rooms below it, never one beside it."""
GROUND = ROOMS[-2] | ROOMS[-1]
"""Modules of the ground may import each other."""
DOORS = {"__main__", "__init__", "transfer"}
"""Names for the outside: the package, and where old bundles look for their loader."""


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def floor_of(room: str) -> int:
    return next(floor for floor, rooms in enumerate(ROOMS) if room in rooms)


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


def may_import(room: str, other: str) -> bool:
    return room == other or {room, other} <= GROUND or floor_of(room) < floor_of(other)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(name_of(path))
    if room in DOORS:
        return
    wrong = {name for name in imported(path) if not may_import(room, room_of(name))}
    assert not wrong, f"{room} may import only itself and what is below it"


def test_no_circle_of_files() -> None:
    """Imports inside of functions and under `TYPE_CHECKING` count too."""
    names = {name_of(path) for path in MODULES}
    graph = {
        name_of(path): {
            target
            for name in imported(path)
            if (target := name if name in names else name.rpartition(".")[0]) in names
        }
        for path in MODULES
        if room_of(name_of(path)) != "__init__"  # it names all, at the first use
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"files import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_and_is_small(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= LONGEST


def test_every_room_is_known() -> None:
    assert {room_of(name_of(path)) for path in MODULES} == set().union(*ROOMS, DOORS)


BESIDE = {"benchmarks", "examples"}
"""Folders of the checkout, beside the package, that have tests."""


def test_each_folder_of_tests_mirrors_a_room() -> None:
    package, tests = ROOT / "medi3d", Path(__file__).parent
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")} - {Path()}
    rooms = {path.parent.relative_to(package) for path in package.rglob("*.py")} | set(map(Path, BESIDE))
    assert folders <= rooms
    held = {one for folder in folders for one in (folder, *folder.parents)} | {Path("transfer")}
    assert {room for room in rooms if room not in held and room.parent not in held - {Path()}} == set()


def test_no_private_name_is_imported() -> None:
    private = {
        name_of(path): found
        for path in MODULES
        if (found := {name for name in imported(path) if name.rpartition(".")[2].startswith("_")})
    }
    assert not private


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
