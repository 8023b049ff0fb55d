"""What every test may ask for."""

import os
from pathlib import Path

import pytest
import torch

from medi3d import torchvision_shim

torchvision_shim.install()  # before any test imports timm


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
