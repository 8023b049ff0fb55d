"""Worker processes that end when their parent is gone."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any


def process_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of processes that die with their parent; spawned, since torch does not survive a fork."""
    return ProcessPoolExecutor(workers, get_context("spawn"), watch_parent)


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
