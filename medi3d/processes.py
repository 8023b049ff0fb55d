"""Worker processes that end when their parent is gone, and whose errors are reported in one line."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread, current_thread, main_thread
from typing import Any

from medi3d.errors import Medi3dError, ResourceError, first_line


def process_pool(
    workers: int, prepare: Callable[..., object] | None = None, *arguments: object
) -> ProcessPoolExecutor:
    """A pool of processes that die with their parent; spawned, since torch does not survive a fork.

    Args:
        workers: number of processes.
        prepare: called with `arguments` in each process before its first task.
    """
    begin: Any = _begin
    return ProcessPoolExecutor(workers, get_context("spawn"), begin, (prepare, *arguments))


def _begin(prepare: Callable[..., object] | None, *arguments: object) -> None:
    watch_parent()
    if prepare is not None:
        prepare(*arguments)


def watch_parent() -> None:
    """End this process when its parent ends: a killed parent cannot say so.

    Otherwise it would wait for work for ever, or run beside the workers of a later call.
    """
    parent = parent_process()
    if parent is not None:
        Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


@contextmanager
def reported_workers() -> Iterator[None]:
    """Report an error of a data loader's worker as the error itself, and a lost worker in one line.

    Raises:
        Medi3dError: as the worker raised it, without its traceback; or a worker process ended.
    """
    try:
        yield
    except Medi3dError as error:
        if not str(error).startswith("Caught "):
            raise
        message = str(error).strip().splitlines()[-1]
        raise type(error)(message.partition(": ")[2] or message) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ResourceError(
            f"a process that loads samples ended ({first_line(error)}): memory? lower training.workers"
        ) from error


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int]]:
    """Note SIGINT and SIGTERM instead of ending, so that the step in progress can end; a second SIGINT ends.

    Yields:
        A function that returns the signal that came, or 0. Outside of the main thread none is noted.
    """
    came = 0

    def note(number: int, frame: Any) -> None:
        nonlocal came
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came = number

    if current_thread() is not main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
