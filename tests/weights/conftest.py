"""Published weights of the shared data, and small networks to load into."""

import pytest


@pytest.fixture
def weights(shared, monkeypatch):
    """Folder of published weights, the only place where they are looked for."""
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(shared / "weights"))
    return shared / "weights"


@pytest.fixture
def nothing_at_hand(tmp_path, monkeypatch):
    """No weights path, an empty cache, no installed package."""
    monkeypatch.delenv("MEDI3D_WEIGHTS_PATH", raising=False)
    monkeypatch.setenv("MEDI3D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("medi3d.weights.catalogue._in_package", lambda row: [])
    return tmp_path


@pytest.fixture
def folder(nothing_at_hand, monkeypatch):
    """An empty folder of weights, the only place where they are looked for."""
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(nothing_at_hand))
    return nothing_at_hand
