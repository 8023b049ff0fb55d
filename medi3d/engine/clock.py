"""Cost of a run so far: wall time and processor time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
    """Wall and processor seconds of a run; it continues from a checkpoint's reading."""

    def __init__(self) -> None:
        self._wall, self._cpu = -time.monotonic(), -cpu_seconds()
        self._wall_apart = self._cpu_apart = 0.0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, time (reading, validation) counts towards a run's cost, but not its training budget."""
        begun = time.monotonic(), cpu_seconds()
        yield
        self._wall_apart += time.monotonic() - begun[0]
        self._cpu_apart += cpu_seconds() - begun[1]

    def read(self) -> dict[str, float]:
        """Seconds so far: "wall_seconds", "cpu_seconds", and of these "training_wall_seconds" and so on."""
        wall, cpu = time.monotonic() + self._wall, cpu_seconds() + self._cpu
        return {
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "training_wall_seconds": wall - self._wall_apart,
            "training_cpu_seconds": cpu - self._cpu_apart,
        }

    def go_on_from(self, reading: dict[str, float]) -> None:
        """Continue from an earlier `reading`."""
        wall, cpu = reading["wall_seconds"], reading["cpu_seconds"]
        self._wall, self._cpu = wall - time.monotonic(), cpu - cpu_seconds()
        self._wall_apart = wall - reading.get("training_wall_seconds", wall)
        self._cpu_apart = cpu - reading.get("training_cpu_seconds", cpu)
