"""Sources by name: known ones, near names for unknown ones, and as many levels as are asked for."""

import pytest
import torch
from torch import nn

from medi3d.errors import SourceError
from medi3d.models import sources
from medi3d.models.sources import build_source, list_sources, register_source


@pytest.mark.parametrize("source", ["inception_v1", "inception_v1_fine", "timm:resnet18"])
def test_known_sources_are_listed(source):
    assert source in list_sources()


@pytest.mark.parametrize(
    "source", ["inception_v1", "inception_v1_fine", "timm:test_resnet", "timm:test_convnext"]
)
def test_levels_are_the_first_ones_of_all(source):
    image = torch.randn(1, 3, 64, 64)
    every = [x.shape for x in build_source(source).eval()(image)]
    for levels in (1, 3):
        assert [x.shape for x in build_source(source, levels=levels).eval()(image)] == every[:levels]


@pytest.mark.parametrize(
    "source", ["inception_v1", "timm:test_resnet", "timm:test_efficientnet", "timm:mobilenetv3_small_050"]
)
def test_fewer_levels_build_no_deeper(source):
    def size(levels):
        return sum(p.numel() for p in build_source(source, levels=levels).parameters())

    assert size(2) < size(4) < size(None)


@pytest.mark.parametrize(
    ("source", "near"),
    [
        ("timm:resnet81", "resnet18"),
        ("timm:eficientnet_b0", "efficientnet_b0"),
        ("inception_v2", "inception_v1"),
        ("resnet18", "timm:resnet18"),
        ("timm:", "timm:NAME"),
        ("", "timm:NAME"),
        ("keras:resnet18", "near: .*timm:.*resnet18"),
    ],
)
def test_an_unknown_source_lists_near_names(source, near):
    with pytest.raises(SourceError, match=near) as refusal:
        build_source(source)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("source", ["inception_v1", "inception_v1_fine", "timm:test_resnet"])
def test_more_levels_than_there_are_are_refused(source):
    with pytest.raises(SourceError):
        build_source(source, levels=9)


def test_what_timm_cannot_build_is_refused_in_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("features_only not implemented\nfor this model")

    monkeypatch.setattr(sources.timm, "create_model", refuse)
    with pytest.raises(SourceError, match=r"'resnet18' as an encoder: features_only not implemented$"):
        build_source("timm:resnet18")


def test_a_source_of_ones_own_can_be_registered(monkeypatch):
    monkeypatch.setattr(sources, "_SOURCES", dict(sources._SOURCES))

    @register_source("mine", "one convolution")
    def mine(levels):
        return nn.Conv2d(3, levels or 7, 1)

    assert "mine" in list_sources()
    assert build_source("mine", levels=2).out_channels == 2
