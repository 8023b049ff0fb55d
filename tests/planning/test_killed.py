"""A preparation that is killed at random, again and again, ends in the files of one that never was."""

from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.killing import content, kill_at_random
from tests.processes import fresh_processes
from tests.tiny import write_cohort

KILLS = 20


def prepare_all(config: Path, out: Path) -> None:
    """What runs in a process of its own; its workers are forked, which is sooner."""
    from medi3d import processes as workers
    from medi3d.planning.prepare import run_prepare

    workers.get_context = lambda _: get_context("fork")
    run_prepare(config, [], out, memory_gb=1, workers=2)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", 24)
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"data: {{root: {cohort}, modality: MR, spacing: [0.5, 0.5, 0.5], patch: [16, 16, 16]}}\n"
        "network: {source: unet}\n"
    )
    context = fresh_processes()

    def start(out: str) -> BaseProcess:
        process = context.Process(target=prepare_all, args=(config, tmp_path / out))
        process.start()
        return process

    def whole(name: str, data: bytes) -> None:
        assert ".tmp" in name or data == content(tmp_path / "undisturbed")[name], "looks complete"

    kill_at_random(start, tmp_path, KILLS, whole)
    assert sum(name.startswith("cache/") for name in content(tmp_path / "killed")) == 24
