"""What writes files must survive being killed at any moment: a harness for tests."""

import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

Check = Callable[[str, bytes], None]


def kill_at_random(start: Callable[[str], BaseProcess], folder: Path, times: int, check: Check) -> None:
    """Start, kill at a random moment and look at what lies there, again and again; then let it end.

    Args:
        start: begins to write what is wanted into `folder / NAME`, in a process of its own.
        folder: gets "undisturbed", which nobody killed, and "killed".
        times: how often it is killed.
        check: is given each relative path and its content after each kill.
    """
    start("warm").join()
    begun = time.monotonic()
    undisturbed = start("undisturbed")
    undisturbed.join()
    duration = time.monotonic() - begun
    assert undisturbed.exitcode == 0
    killed, moment = 0, random.Random(0)
    for _ in range(times):
        process = start("killed")
        process.join(moment.uniform(0, duration))
        done = not process.is_alive()
        killed += not done
        process.kill()
        process.join()
        for name, data in content(folder / "killed").items():
            check(name, data)
        if done:
            shutil.rmtree(folder / "killed")  # all was there: there would be nothing left to kill
    last = start("killed")
    last.join()
    assert last.exitcode == 0
    assert killed >= times // 4
    assert content(folder / "killed") == content(folder / "undisturbed")


def content(folder: Path) -> dict[str, bytes]:
    """Of every file by its path; the folder's own path in it is replaced."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data.replace(str(folder).encode(), b"FOLDER") for name, data in files.items()}
