"""Processes for tests, out of a server that has imported the libraries: importing them costs 7 s."""

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed.launcher import api as launcher

PRELOADED = [
    "medi3d.comparison.executor",
    "medi3d.models.segmenter",
    "medi3d.planning.prepare",
    "medi3d.prediction.predict",
    "medi3d.training.crossvalidation",
]


def fresh_processes(_: str = "spawn") -> ForkServerContext:
    """In place of `multiprocessing.get_context("spawn")`; the environment is that of the server's start."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_command(*arguments: object, log: Path | None = None, **environment: object) -> BaseProcess:
    """`medi3d ARGUMENTS` in a process of its own, which can be killed; what it prints goes to `log`."""
    given = {key: str(value) for key, value in environment.items()}
    process = fresh_processes().Process(target=_run, args=([*map(str, arguments)], log, given))
    process.start()
    return process


def run_two_processes(*arguments: object, folder: Path) -> list[str]:
    """`torchrun --standalone --nproc_per_node 2 -m medi3d ARGUMENTS`; what each process printed."""
    one = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0}
    meeting = {"run_id": folder.name, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    fresh_processes()
    config = launcher.LaunchConfig(**one, **meeting, start_method="forkserver")
    launcher.elastic_launch(config, _run_rank)([*map(str, arguments)], folder)
    return [(folder / f"rank{rank}.log").read_text() for rank in range(2)]


def _run_rank(arguments: list[str], folder: Path) -> None:
    try:
        _run(arguments, folder / f"rank{os.environ['RANK']}.log", {})
    except SystemExit as end:  # the agent takes any for a failure
        if end.code:
            raise


def _run(arguments: list[str], log: Path | None, environment: Mapping[str, str]) -> None:
    from medi3d import processes
    from medi3d.cli import main

    processes.get_context = lambda _: get_context("fork")  # of its own workers
    os.environ.update(environment)
    sys.argv = ["medi3d", *arguments]
    with open(log or os.devnull, "w") as file, redirect_stdout(file), redirect_stderr(file):
        main()


def stop_server() -> None:
    """End the server and wait for it, so that its processor time is counted with that of the tests."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
