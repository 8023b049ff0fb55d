"""Worker processes that end when their parent is gone, and whose errors are reported in one line."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread
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
