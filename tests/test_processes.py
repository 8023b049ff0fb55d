"""Worker processes end with the one that started them, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medi3d.errors import DataError, ResourceError
from medi3d.processes import reported_workers

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


IN_A_WORKER = """Caught DataError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1
medi3d.errors.DataError: a.nii.gz: damaged
"""
LOST = "DataLoader worker (pid 7) is killed by signal: Killed. "


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (DataError(IN_A_WORKER), DataError, r"^a\.nii\.gz: damaged$"),
        (RuntimeError(LOST), ResourceError, r"lower training\.workers"),
        (DataError("a.nii.gz: damaged"), DataError, r"^a\.nii\.gz: damaged$"),
        (RuntimeError("of our own"), RuntimeError, "of our own"),
    ],
    ids=["raised in a worker", "a worker killed", "raised here", "a defect"],
)
def test_errors_of_workers_are_one_line(error, kind, words):
    with pytest.raises(kind, match=words), reported_workers():
        raise error
