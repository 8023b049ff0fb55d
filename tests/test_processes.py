"""Worker processes end with the one that started them, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STARTER = """
import os, time
from medi3d.processes import process_pool
pool = process_pool(1)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 600).result()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_a_worker_ends_with_its_parent(end):
    with subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        worker = Path("/proc", starter.stdout.readline().strip())
        assert worker.is_dir()
        os.kill(starter.pid, end)
    for _ in range(300):
        if not worker.is_dir():
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there after 30 s")


def test_every_pool_of_processes_watches_its_parent():
    users = [path for path in Path("medi3d").rglob("*.py") if "ProcessPoolExecutor(" in path.read_text()]
    assert users
    assert not [path for path in users if "watch_parent" not in path.read_text()]
