"""What scripts rely on: the names of DESIGN.md, and their signatures."""

import inspect
import subprocess
import sys

import pytest

import medi3d

NAMES = [
    *("inflate", "verify", "KernelPlan", "create_encoder", "create_segmenter", "create_classifier"),
    *("load_weights", "list_weights", "list_sources"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_contract_is_there(name):
    assert name in medi3d.__all__
    assert name in dir(medi3d)
    assert callable(getattr(medi3d, name))


@pytest.mark.parametrize("name", medi3d.__all__)
def test_every_name_that_is_offered_can_be_imported_and_is_documented(name):
    assert inspect.getdoc(getattr(medi3d, name))
    assert name in medi3d._HOMES


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'infalte'"):
        _ = medi3d.infalte


SIGNATURES = {
    "inflate": {"plan": "isotropic", "profile": "mean", "in_channels": None, "allow_inexact": False},
    "verify": {"size": None, "depth": None},
    "create_encoder": {"weights": None, "plan": "isotropic", "in_channels": 1},
}
POSITIONAL = {
    "inflate": ["net2d", "plan"],
    "verify": ["net2d", "net3d"],
    "create_encoder": ["source"],
    "create_segmenter": ["encoder_or_source"],
    "create_classifier": ["encoder_or_source"],
    "load_weights": ["module"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_options_have_the_promised_defaults(name):
    parameters = inspect.signature(getattr(medi3d, name)).parameters
    assert {key: parameters[key].default for key in SIGNATURES[name]} == SIGNATURES[name]


@pytest.mark.parametrize("name", POSITIONAL)
def test_the_first_arguments_have_the_promised_names(name):
    parameters = inspect.signature(getattr(medi3d, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[: len(POSITIONAL[name])] == POSITIONAL[name]
    if name.startswith("create_") and name != "create_encoder":
        assert inspect.signature(getattr(medi3d, name)).parameters["num_classes"].kind.name == "KEYWORD_ONLY"


@pytest.mark.parametrize("name", ["isotropic", "video", "planar", "from_spacing", "from_yaml"])
def test_every_kind_of_plan_can_be_made(name):
    assert callable(getattr(medi3d.KernelPlan, name))


def test_reports_have_the_promised_fields():
    from torch import nn

    net = nn.Conv2d(1, 2, 3, padding=1)
    report = medi3d.verify(net, medi3d.inflate(net))
    assert isinstance(report, medi3d.ExactnessReport)
    assert report.max_rel_error <= 1e-9
    assert report.mixes_depth is True
    assert len(report.levels) == 1
    assert medi3d.inflate(net).report.max_rel_error <= 1e-9


def test_lists_name_what_the_contract_names():
    assert {"imagenet/efficientnet-lite0", "kinetics400/i3d-rgb", "kinetics400/i3d-flow", "timm"} <= {
        row.name for row in medi3d.list_weights()
    }
    assert {"inception_v1", "timm:resnet18"} <= set(medi3d.list_sources())


def test_every_expected_error_is_a_medi3d_error():
    from medi3d import errors

    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert len(kinds) > 5
    assert all(issubclass(kind, medi3d.Medi3dError) for kind in kinds)


def test_timm_can_be_imported_behind_medi3d():
    script = "import medi3d, importlib.util\nassert importlib.util.find_spec('torchvision')\nimport timm"
    subprocess.run([sys.executable, "-c", script], check=True)
