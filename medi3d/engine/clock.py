"""What a run has cost so far: wall time, processor time, and the share that went into waiting for data."""

import time

import psutil


def cpu_seconds() -> float:
    """Processor time in seconds, user and system, of this process and its children, living and ended."""
    process = psutil.Process()
    own = process.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in process.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


class Clock:
    """Wall and processor seconds of a run; it goes on from where a checkpoint stood."""

    def __init__(self) -> None:
        self._wall, self._cpu = -time.monotonic(), -cpu_seconds()

    def read(self) -> dict[str, float]:
        """Seconds so far, under "wall_seconds" and "cpu_seconds"."""
        return {"wall_seconds": time.monotonic() + self._wall, "cpu_seconds": cpu_seconds() + self._cpu}

    def go_on_from(self, reading: dict[str, float]) -> None:
        """Count from an earlier `reading` on."""
        self._wall = reading["wall_seconds"] - time.monotonic()
        self._cpu = reading["cpu_seconds"] - cpu_seconds()
