"""Optical flow of clips: the motion of each pixel to the next frame, the input of I3D's second stream.

TV-L1 (Zach et al. 2007) by OpenCV's contributed modules with its default settings, on grey frames; truncated
to 20 pixels either way and kept as bytes, so that bytes 0 to 255 are -1 to 1 (Carreira & Zisserman 2017, and
google-deepmind/kinetics-i3d, README). Half a step of these bytes is 0.08 pixels; no motion is 128, not exact.

It takes about a second a frame at full size, so it is computed once and kept on disk, by the content of the
clip and all settings: an interrupted run resumes where it stopped, a changed clip is recomputed.
"""

import hashlib
import importlib
import os
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medi3d.datasets.clips.frames import pictures_in, read_frames
from medi3d.errors import DataError, Medi3dError
from medi3d.processes import process_pool

LIMIT = 20.0
"""Pixels per frame beyond which flow is truncated, as the paper's code does."""

_METHOD = "tvl1-1"
"""Part of every key; change it with any code below that changes results."""


def compute_flow(frames: Tensor) -> Tensor:
    """TV-L1 flow from each frame to the next, in pixels: uint8 `(3, T, H, W)` -> float32 `(2, T, H, W)`.

    Channels are the motion to the right and down. The last frame repeats the flow before it, so that flow
    and pictures have equal length; a single frame has zero flow.

    Raises:
        DataError: OpenCV's contributed modules are not installed.
    """
    cv2 = _import_cv2()
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames.permute(1, 2, 3, 0).contiguous().numpy()]
    flow = np.zeros((2, *frames.shape[1:]), np.float32)
    method = cv2.optflow.DualTVL1OpticalFlow_create()
    for t in range(len(grey) - 1):
        flow[:, t] = method.calc(grey[t], grey[t + 1], None).transpose(2, 0, 1)
    if len(grey) > 1:
        flow[:, -1] = flow[:, -2]
    return torch.from_numpy(flow)


def to_bytes(flow: Tensor) -> Tensor:
    """Flow in pixels as bytes: -20 and below is 0, 20 and above is 255."""
    return ((flow.clamp(-LIMIT, LIMIT) + LIMIT) * (255 / (2 * LIMIT))).round().to(torch.uint8)


def read_flow(
    path: str | Path,
    cache: str | Path | None = None,
    *,
    side: int | None = None,
    keep: int | None = None,
    rate: float = 0,
) -> Tensor:
    """Read the flow of a clip as uint8 `(2, T, H, W)`, on the frames of `read_frames`; computed only once.

    Args:
        path: of the clip.
        cache: folder of computed flow; None: below `MEDI3D_CACHE` or `~/.cache/medi3d`.
        side: see `read_frames`, as `keep` and `rate`.

    Raises:
        DataError: the clip is missing or damaged, OpenCV's contributed modules are not installed, or the
            cache cannot be written.
    """
    kept = cached_flow(path, cache, side=side, keep=keep, rate=rate)
    if kept.is_file():
        try:
            with kept.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return torch.from_numpy(arrays["flow"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # damaged on disk: recomputed
    flow = to_bytes(compute_flow(read_frames(path, side, keep, rate)))
    try:
        _keep(flow, kept)
    except OSError as error:
        raise DataError(f"{kept.parent}: cannot keep flow there ({error.strerror or error})") from error
    return flow


def _keep(flow: Tensor, kept: Path) -> None:
    """Write under a name of this process and rename, since several processes may compute the same clip."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    aside = kept.with_name(f"{kept.stem}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            np.savez_compressed(file, flow=flow.numpy())
        os.replace(aside, kept)
    finally:
        aside.unlink(missing_ok=True)


def cached_flow(path: str | Path, cache: str | Path | None = None, **settings: Any) -> Path:
    """Path of the cached flow of a clip, named by the SHA-256 of its content and of all settings.

    Raises:
        DataError: the clip does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such clip")
    digest = hashlib.sha256(f"{_METHOD} {LIMIT} {sorted(settings.items())}".encode())
    for file in pictures_in(path) if path.is_dir() else [path]:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    root = Path(os.environ.get("MEDI3D_CACHE") or Path.home() / ".cache" / "medi3d")
    name = digest.hexdigest()
    return Path(cache or root / "flow") / name[:2] / f"{name}.npz"


def fill_cache(
    paths: Iterable[str | Path],
    cache: str | Path | None = None,
    *,
    processes: int = 1,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[Path]:
    """Compute the flow of many clips, each in a process of its own; cached flow is skipped.

    Args:
        paths: of the clips.
        cache: see `read_flow`, as `settings`.
        processes: number of parallel processes.
        say: called with a line for each clip.

    Returns:
        The damaged clips, which have no flow; `say` gets a line for each.
    """
    missing = [Path(p) for p in paths if not cached_flow(p, cache, **settings).is_file()]
    damaged = []
    work = partial(_fill_one, cache=cache, settings=settings)
    with process_pool(processes) as pool:
        done = {pool.submit(work, path): path for path in missing}
        for number, future in enumerate(as_completed(done), start=1):
            if future.result():
                damaged.append(done[future])
            if say:
                say(f"flow {number}/{len(missing)}: {future.result() or done[future].name}")
    return damaged


def _fill_one(path: Path, cache: str | Path | None, settings: dict[str, Any]) -> str:
    """The reason why the clip has no flow, if any. Uses one thread: the processes share the cores already."""
    _import_cv2().setNumThreads(1)
    try:
        read_flow(path, cache, **settings)
    except Medi3dError as error:
        return str(error)
    return ""


def _import_cv2() -> Any:
    try:
        cv2: Any = importlib.import_module("cv2")
        cv2.optflow.DualTVL1OpticalFlow_create  # noqa: B018 - exists only with the contributed modules
    except (ImportError, AttributeError) as error:
        raise DataError(
            "optical flow needs OpenCV with its contributed modules: pip install 'medi3d[video]'"
        ) from error
    return cv2
