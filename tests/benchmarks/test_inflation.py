"""The sweep over timm's families: it counts right, and does not take the network's word for it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "inflation.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmarks_inflation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks_inflation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmarks_inflation"]


def test_one_wrong_position_is_an_error(bench):
    answers = [torch.randn(2, 3, 4, 4, dtype=torch.float64)]
    outputs = [answers[0].unsqueeze(2).repeat(1, 1, 5, 1, 1)]
    assert bench.worst_error(outputs, answers) == 0
    outputs[0][1, 0, 4, 0, 0] += 1
    assert bench.worst_error(outputs, answers) > 0.1
    outputs[0][1, 0, 4, 0, 0] = float("nan")
    assert bench.worst_error(outputs, answers) == float("inf")


def test_equal_answers_prove_nothing(bench):
    answer = torch.ones(2, 3, 4, 4)
    with pytest.raises(AssertionError, match="nothing would be proven"):
        bench.worst_error([answer.unsqueeze(2)], [answer])


def test_counts_and_table(bench, tmp_path):
    rows = [
        bench.Row("a", "exact", "a_1", errors={"8": 1e-15, "32": 2e-15}, strides=[[2, 2]], mixes_depth=True),
        bench.Row("b", "exact", "b_1", errors={"8": 1e-15, "32": 2e-15}, strides=[[1, 2]]),
        bench.Row("c", "WRONG", "c_1", errors={"8": 0.5, "32": 0.5}, strides=[[2, 2]], mixes_depth=True),
        bench.Row("d", reason="no 2D convolution | none"),
    ]
    assert list(bench.summary(rows).values()) == [4, 2, 1, 1, 1, 0, 1]
    page = tmp_path / "families.md"
    page.write_text(f"# Before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    bench.write_markdown(page, bench.markdown(rows, "command"))
    text = page.read_text()
    assert text.startswith("# Before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "no 2D convolution \\| none" in text
    assert text.count("\n| ") == 1 + len(rows)
