"""Processes that work on cases, and end when the one that started them is gone."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any


def process_pool(workers: int) -> ProcessPoolExecutor:
    """So many processes, each gone with its parent; started anew, as threads of torch survive no fork."""
    return ProcessPoolExecutor(workers, get_context("spawn"), watch_parent)


def watch_parent() -> None:
    """End this process when its parent ends: one that is killed cannot tell it to.

    Else it would wait for work for ever, or go on beside the one that a later call starts.
    """
    parent = parent_process()
    if parent is not None:
        Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
