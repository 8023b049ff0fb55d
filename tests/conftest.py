"""What every test may ask for."""

import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from medi3d import cli, processes, torchvision_shim
from tests import figures
from tests.processes import fresh_processes, stop_server
from tests.scan_files import write_nifti, write_series
from tests.tiny import clips, cohort, config

__all__ = ["clips", "cohort", "config", "write_nifti", "write_series"]

torchvision_shim.install()  # before any test imports timm


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Figures that nobody looks at are not drawn."""
    figures.draw_only_where_looked_at(item)


processes.get_context = fresh_processes


def pytest_sessionfinish() -> None:
    stop_server()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the real data sets; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("MEDI3D_SHARED", "../shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set MEDI3D_SHARED)")
    return folder.resolve()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def medi3d(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["medi3d", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def encode(tmp_path: Path) -> Callable[..., Path]:
    """Pictures (H, W, 3) as a video of 25 frames per second, or shown at the given times in 1/1000 s."""
    av = pytest.importorskip("av")

    def write(
        pictures: list[np.ndarray],
        name: str = "clip.mp4",
        *,
        codec: str = "mpeg4",
        times: list[int] | None = None,
        options: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", options=options or {}) as container:
            stream = container.add_stream(codec, rate=25)
            height, width = pictures[0].shape[:2]
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            for number, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if times is not None:
                    frame.pts, frame.time_base = times[number], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write
