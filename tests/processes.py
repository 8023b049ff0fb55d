"""Processes for tests, out of a server that has imported the libraries: importing them costs 7 s."""

import os
import socket
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

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
    """`medi3d ARGUMENTS` by two processes that join as those of torchrun do; what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        start_command(*arguments, log=log, RANK=rank, LOCAL_RANK=rank, **place)
        for rank, log in enumerate(logs)
    ]
    for process in started:
        process.join(600)
    assert [process.exitcode for process in started] == [0, 0], [log.read_text() for log in logs]
    return [log.read_text() for log in logs]


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
