"""What the benchmark measures is what it says: one pass, in one process, of the network asked for."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmarks_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_is_that_of_the_pass(bench, monkeypatch):
    held = torch.nn.Module()
    held.forward = lambda volume: [torch.ones(32 * 2**18)]  # 32 MiB, and nothing else
    monkeypatch.setattr(bench, "build", lambda contender, network: held)
    assert bench.measure_memory("medi3d", "any", "forward", 64) == pytest.approx(32 * 2**20, rel=0.1)


@pytest.mark.parametrize("contender", ["medi3d", "medi3d channels-last"])
def test_both_layouts_are_the_same_network(bench, contender):
    net, plain = bench.build(contender, "test_resnet").eval(), bench.build("medi3d", "test_resnet").eval()
    volume = torch.randn(1, 1, 32, 32, 32)
    for ours, expected in zip(net(volume), plain(volume), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    weight = net.network.conv1[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) or contender == "medi3d"


def test_a_missing_rival_is_told_in_one_line():
    if importlib.util.find_spec("timm_3d") is not None:
        pytest.skip("timm_3d is installed")
    answer = run("--networks", "resnet50")
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "pip install 'medi3d[peers]', or give --peers FOLDER" in answer.stderr
