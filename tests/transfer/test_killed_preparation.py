"""A preparation that is killed at random, again and again, ends in the files of one that never was."""

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.transfer.conftest import write_cohort

KILLS = 20


def prepare_all(config: Path, out: Path) -> None:
    """What runs in a process of its own; its workers are forked, which is sooner."""
    from medi3d.datasets import workers
    from medi3d.prepare import run_prepare

    workers.get_context = lambda _: multiprocessing.get_context("fork")
    run_prepare(config, [], out, memory_gb=1, workers=2)


def content(folder: Path) -> dict[str, str | bytes]:
    """Of every file; the folder itself is named in the config."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data.replace(str(folder).encode(), b"FOLDER") for name, data in found.items()}


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", 24)
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"data: {{root: {cohort}, modality: MR, spacing: [0.5, 0.5, 0.5], patch: [16, 16, 16]}}\n"
        "network: {source: unet}\n"
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "monai.data.utils", "medi3d.prepare", "medi3d.models.segmenter"])

    def start(out: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=prepare_all, args=(config, tmp_path / out))
        process.start()
        return process

    start("warm").join()
    begun = time.monotonic()
    undisturbed = start("undisturbed")
    undisturbed.join()
    duration = time.monotonic() - begun
    assert undisturbed.exitcode == 0
    expected = content(tmp_path / "undisturbed")
    assert sum(name.startswith("cache/") for name in expected) == 24
    killed, moment = 0, random.Random(0)
    for _ in range(KILLS):
        process = start("killed")
        process.join(moment.uniform(0, duration))
        killed += process.is_alive()
        done = not process.is_alive()
        process.kill()
        process.join()
        for name, data in content(tmp_path / "killed").items():
            assert name.endswith(".tmp") or data == expected[name], "a partial file looks complete"
        if done:
            shutil.rmtree(tmp_path / "killed")  # all was there: there would be nothing left to kill
    last = start("killed")
    last.join()
    assert last.exitcode == 0
    assert killed >= KILLS // 4
    assert content(tmp_path / "killed") == expected
