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
    begin, end = (f"<!-- {place}: {bench.INFLATION.mark} -->" for place in ("begin", "end"))
    page.write_text(f"# Before\n{begin}\nold\n{end}\nafter\n")
    bench.write_markdown(page, bench.markdown(rows, "command"))
    text = page.read_text()
    assert text.startswith("# Before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "no 2D convolution \\| none" in text
    assert text.count("\n| ") == 1 + len(rows)


def test_a_step_of_a_segmenter_is_told_with_its_size_and_proof(bench):
    row = bench.measure_segmenter("resnet", "test_resnet", [8, 40, 24], 1, True)
    assert (row.status, row.patch, row.reason) == ("trained", "8×40×24", "")
    assert row.proof <= 1e-9
    assert row.strides[0] == [2, 2, 2]


def test_a_defect_is_a_traceback_and_a_refusal_is_not(bench, monkeypatch):
    from medi3d.errors import ShapeError
    from medi3d.models import networks

    def build(error):
        def create_segmenter(*args, **kwargs):
            raise error

        monkeypatch.setattr(networks, "create_segmenter", create_segmenter)
        return bench.measure_segmenter("resnet", "test_resnet", [8, 40, 24], 1, False)

    rows = [build(error) for error in (AttributeError("no 'same'"), ShapeError("one size"), MemoryError())]
    assert [row.status for row in rows] == ["TRACEBACK", "refused", "failed"]
    assert list(bench.segmenter_summary(rows).values()) == [3, 0, 1, 1, 1]
    assert "AttributeError: no 'same'" in bench.markdown(rows, "command", bench.SEGMENTER)
