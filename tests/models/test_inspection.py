"""What `medi3d inspect` tells: counted independently."""

import pytest
import torch
from torch import nn

from medi3d.errors import SourceError
from medi3d.inflation.plan import KernelPlan
from medi3d.models import sources as registry
from medi3d.models.artifact import save_artifact
from medi3d.models.encoders import create_encoder
from medi3d.models.inspection import inspect_source


@pytest.fixture(autouse=True)
def tiny_source(monkeypatch):
    monkeypatch.setattr(registry, "_SOURCES", dict(registry._SOURCES))
    registry.register_source("tiny", "for these tests")(lambda levels: Tiny())


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.stem(x)
        return [x, self.deep(x)]


@pytest.mark.parametrize(
    ("plan", "taps", "positions"),
    [("isotropic", 3, 8**3), ("planar", 1, 16 * 8 * 8)],
)
def test_parameters_and_operations_are_those_of_the_kernels(plan, taps, positions):
    report = inspect_source("tiny", KernelPlan.named(plan), in_channels=2, size=16)
    kernels = 4 * 2 * 9 * taps, 6 * 4 * 9 * taps
    assert report["parameters"] == sum(kernels) + 4
    assert report["multiply_adds"] == sum(kernels) * positions
    assert report["size"] == 16


def test_operations_are_those_of_plain_3d_convolutions():
    from torch.utils.flop_counter import FlopCounterMode

    plain = nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), nn.Conv3d(4, 6, 3, padding=1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.zeros(1, 1, 24, 24, 24))
    counted = inspect_source("tiny", KernelPlan.isotropic(), size=24)["multiply_adds"]
    assert counted == counter.get_total_flops() // 2


def test_layers_and_levels_are_the_encoders():
    report = inspect_source("tiny", KernelPlan.from_spacing((4, 1, 1)))
    assert [(row["name"], row["kernel_3d"], row["stride_3d"]) for row in report["layers"]] == [
        ("stem", (1, 3, 3), (1, 2, 2)),
        ("deep", (1, 3, 3), (1, 1, 1)),
    ]
    assert [level["stride"] for level in report["levels"]] == [(1, 2, 2), (1, 2, 2)]
    assert [level["receptive_field_voxels"] for level in report["levels"]] == [(1, 3, 3), (1, 7, 7)]
    assert report["plan"]["spacing"] == [4, 1, 1]


def test_an_artifact_is_inspected_under_its_own_plan(tmp_path):
    path = save_artifact(create_encoder("tiny", plan="planar"), tmp_path / "tiny.safetensors")
    report = inspect_source(str(path), KernelPlan.isotropic(), size=8)
    assert report["plan"]["name"] == "planar"
    assert report["layers"][0]["kernel_3d"] == (1, 3, 3)


def test_an_unknown_source_is_refused():
    with pytest.raises(SourceError, match="near: tiny"):
        inspect_source("tyni", KernelPlan.isotropic())
