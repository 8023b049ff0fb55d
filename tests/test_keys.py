"""Digests of settings do not change when a key is added, unless it is used."""

from dataclasses import asdict, dataclass, field

import pytest

from medi3d.errors import ConfigError
from medi3d.experiment.config import load_config
from medi3d.keys import check_inert, check_name, stable_dict, younger


@dataclass(frozen=True)
class Before:
    steps: int = 4
    drops: list[float] = field(default_factory=lambda: [0.5])


@dataclass(frozen=True)
class After(Before):
    nan: str = younger("refuse")
    windows: list[int] = younger([1, 2])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (After(), {}),
        (After(nan="background"), {"nan": "background"}),
        (After(windows=[3]), {"windows": [3]}),
    ],
    ids=["at its default", "a text", "a list"],
)
def test_a_younger_key_counts_only_where_it_is_set(settings, expected):
    assert stable_dict({"a": [settings]}) == {"a": [asdict(Before()) | expected]}


def test_lists_are_not_shared():
    assert After().windows is not After().windows


def test_without_younger_keys_it_is_asdict(config):
    experiment = load_config(config)
    old = stable_dict(experiment)
    assert set(old) <= set(asdict(experiment))
    assert old["training"]["steps"] == 4


@pytest.mark.parametrize(
    "value",
    ["$__import__('os')", " @network", "%plan", "a${oc.env:HOME}", "x\x1b[2J", {"k": ["$x"]}, {"$k": 1}],
)
def test_text_that_would_be_executed_is_refused(value):
    with pytest.raises(ConfigError, match="network"):
        check_inert("network", value)


@pytest.mark.parametrize("value", ["timm:resnet18", "a@b", "50%", "file:/x/$y.pt", None, 3, ["hf:A/B@main"]])
def test_other_values_pass(value):
    check_inert("network", value)


@pytest.mark.parametrize("name", ["..", ".hidden", "-rf", "a/b", "", "a b"])
def test_a_name_is_safe_as_a_folder(name):
    with pytest.raises(ConfigError, match="name is"):
        check_name("name", name)
