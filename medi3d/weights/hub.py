"""Weights on a model hub: `hf:ORG/NAME[@REVISION][/FILE]`, through `huggingface_hub` and its cache.

A revision (branch, tag, commit; none: the main branch) is resolved to its commit, which is kept with the
weights, so that a name is pinned once it has been used. The cache is the hub's own (`HF_HOME`,
`HF_HUB_CACHE`); with `HF_HUB_OFFLINE=1`, or without a connection, weights come only from there.
"""

import json
import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard import metadata_load

from medi3d.errors import WeightsError
from medi3d.files import file_sha256
from medi3d.weights.rows import InputContract

PREFIX = "hf:"
_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_USUAL = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""Usual names of a repository's only weights file, best first."""
_KINDS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar")
"""Suffixes of weights, best first."""
_CONNECTION_SECONDS = 20
log = logging.getLogger("medi3d")


@dataclass(frozen=True)
class HubFile:
    """A weights file of a repository, on this machine."""

    name: str
    """`hf:ORG/NAME@COMMIT/FILE`"""
    path: Path
    licence: str
    contract: InputContract | None
    """The input contract in the repository's own configuration."""


@dataclass(frozen=True)
class _Snapshot:
    """A repository at one revision."""

    repo: str
    revision: str
    files: list[str]
    here: bool = False
    """Whether only the cache was consulted."""

    def fetch(self, file: str) -> Path:
        path = huggingface_hub.hf_hub_download(
            self.repo,
            file,
            revision=self.revision,
            endpoint=os.environ.get("HF_ENDPOINT"),
            cache_dir=_cache(),
            local_files_only=self.here,
        )
        return Path(path)


def find_on_hub(name: str) -> HubFile:
    """The file that `hf:ORG/NAME[@REVISION][/FILE]` names, fetched if it is not in the cache.

    Without FILE the repository's only weights file is taken, safetensors before pickles.

    Raises:
        WeightsError: the name is malformed, there is no such repository, revision or file, access is not
            granted, several files are equally likely, the file is damaged, or there is no connection and the
            cache does not have it.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise WeightsError(f"{name!r} is not a name on the hub: use hf:ORG/NAME[@REVISION][/FILE]")
    repo, revision = parts["repo"], parts["revision"] or "main"
    try:
        snapshot = _snapshot(repo, revision)
        file = _choose(snapshot, parts["file"])
        path = snapshot.fetch(file)
        pinned = replace(snapshot, revision=_commit(path))  # the commit that was downloaded
        contract, licence = _contract(pinned), _licence(pinned)
    except GatedRepoError as error:
        raise WeightsError(
            f"{name}: access to {repo} must be granted: accept its terms on the hub, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(f"{name}: the hub has no repository {repo}, or it is private") from error
    except RevisionNotFoundError as error:
        raise WeightsError(f"{name}: {repo} has no revision {revision!r}") from error
    except EntryNotFoundError as error:
        raise WeightsError(
            f"{name}: {repo} has no file {parts['file']!r}, or it is not in the cache"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise WeightsError(f"{name}: cannot get it from the hub ({_one_line(error)})") from error
    blob = path.resolve().name
    if _SHA256.fullmatch(blob) and file_sha256(path) != blob:
        raise WeightsError(f"{path}: damaged, its SHA-256 is not the hub's, {blob}; remove it")
    return HubFile(f"{PREFIX}{repo}@{pinned.revision}/{file}", path, licence, contract)


def _commit(path: Path) -> str:
    """The commit of a file in the cache, `snapshots/COMMIT/FILE`."""
    folders = path.parts
    return folders[len(folders) - folders[::-1].index("snapshots")]


def _snapshot(repo: str, revision: str) -> _Snapshot:
    cached = _cached(repo, revision)
    if cached is not None and _COMMIT.fullmatch(revision):
        return cached  # a commit never changes
    if _is_offline():
        if cached is None:
            raise WeightsError(
                f"hf:{repo}@{revision} is not in the cache {_cache()}, and HF_HUB_OFFLINE is set"
            )
        return cached
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        info = api.model_info(repo, revision=revision, timeout=_CONNECTION_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # whatever its HTTP library raises without a connection
        if cached is None:
            raise WeightsError(
                f"hf:{repo}: no connection to the hub ({_one_line(error)}), and it is not in the cache"
            ) from error
        log.warning(f"no connection to the hub: using {repo} at {cached.revision} from the cache")
        return cached
    return _Snapshot(repo, revision, [sibling.rfilename for sibling in info.siblings or []])


def _cached(repo: str, revision: str) -> _Snapshot | None:
    """The hub's cached snapshot: `refs/REVISION` names the commit, `snapshots/COMMIT` holds its files."""
    folder = Path(_cache()) / f"models--{repo.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())
    return _Snapshot(repo, commit, files, here=True)


def _choose(snapshot: _Snapshot, wanted: str | None) -> str:
    repo, files = f"hf:{snapshot.repo}", snapshot.files
    where = " in the cache" if snapshot.here else ""
    usable = [file for file in files if Path(file).suffix in _KINDS and "training_args" not in file]
    if wanted is not None:
        if wanted not in files:
            raise WeightsError(
                f"{repo} has no file {wanted!r}{where}; its weights: {', '.join(usable) or 'none'}"
            )
        return wanted
    for usual in _USUAL:
        if usual in usable:
            return usual
    for kind in _KINDS:
        fits = [file for file in usable if file.endswith(kind)]
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise WeightsError(
                f"{repo} has several weights files: {', '.join(fits[:6])}; choose with {repo}/FILE"
            )
    raise WeightsError(f"{repo} has no weights file{where}: none ends in {', '.join(_KINDS)}")


def _contract(snapshot: _Snapshot) -> InputContract | None:
    """Mean and std from timm's `config.json`, or from `preprocessor_config.json`."""
    if "config.json" in snapshot.files:
        told = _json(snapshot.fetch("config.json")).get("pretrained_cfg") or {}
        if told.get("mean") and told.get("std"):
            size = (told.get("input_size") or (3, 224, 224))[-1]
            return InputContract(tuple(told["mean"]), tuple(told["std"]), size=size)
    if "preprocessor_config.json" in snapshot.files:
        told = _json(snapshot.fetch("preprocessor_config.json"))
        if told.get("image_mean") and told.get("image_std") and told.get("do_normalize", True):
            return InputContract(tuple(told["image_mean"]), tuple(told["image_std"]))
    return None


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    return content if isinstance(content, dict) else {}


def _licence(snapshot: _Snapshot) -> str:
    """The metadata of the repository's card."""
    if "README.md" not in snapshot.files:
        return "unknown"
    card = metadata_load(snapshot.fetch("README.md")) or {}
    return str(card.get("license_name") or card.get("license") or "unknown")


def _cache() -> str:
    return os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE


def _is_offline() -> bool:
    """The library reads the variable when it is imported, which may be before it was set."""
    now = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return constants.HF_HUB_OFFLINE or now


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
