"""Where the runs of a comparison execute: in local processes, or on Ray."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from medi3d.comparison.cell import run_cell
from medi3d.comparison.grid import Cell
from medi3d.engine.log import screen
from medi3d.errors import ConfigError, first_line
from medi3d.processes import process_pool

ATTEMPTS = 3
"""Attempts at a run whose process dies."""

Outcome = tuple[Cell, str | None]
"""A finished run, and None or one line that says why it failed."""

Executor = Callable[[Sequence[Cell], Path], Iterator[Outcome]]
"""(Runs, their parent folder) -> outcomes, in the order of completion."""

LOST = f"its process was lost {ATTEMPTS} times: out of memory?"


def local_workers(threads: int) -> int:
    """One worker per GPU; without GPUs, one per `threads` cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.cuda.device_count() or max(1, cores // threads)


class LocalExecutor:
    """Local processes, `workers` at a time, each with the number of threads that its run asks for.

    A run whose process dies is restarted from its last checkpoint.
    """

    def __init__(self, workers: int | None = None, run: Callable[[Cell, Path], str | None] = run_cell):
        if workers is not None and workers < 1:
            raise ConfigError(f"--workers is {workers}: at least 1")
        self.workers, self.run = workers, run

    def __call__(self, cells: Sequence[Cell], folder: Path) -> Iterator[Outcome]:
        """Compute `cells`."""
        queue, lost = deque(cells), Counter[str]()
        count = min(len(cells), self.workers or local_workers(cells[0].threads)) if cells else 0
        idle = deque(range(count))
        # One pool per worker, so that a crash does not take other runs with it.
        pools: dict[int, ProcessPoolExecutor] = {}
        running: dict[Future, tuple[int, Cell]] = {}
        try:
            while queue or running:
                while queue and idle:
                    slot, cell = idle.popleft(), queue.popleft()
                    pool = pools.get(slot) or process_pool(1, become_worker, cell.threads, slot)
                    pools[slot] = pool
                    running[pool.submit(self.run, cell, folder)] = slot, cell
                done = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
                slot, cell = running.pop(done)
                idle.append(slot)
                try:
                    outcome = cell, done.result()
                except BrokenProcessPool:
                    pools.pop(slot).shutdown()
                    lost[cell.id] += 1
                    if lost[cell.id] < ATTEMPTS:
                        queue.appendleft(cell)
                        continue
                    outcome = cell, LOST
                yield outcome
        finally:
            for pool in pools.values():
                pool.shutdown(cancel_futures=True)


def become_worker(threads: int, slot: int | None = None) -> None:
    """Prepare a worker process: silent, with its share of cores and a GPU."""
    import SimpleITK as sitk

    screen.file = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    torch.set_num_threads(threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    if slot is not None and torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(slot % torch.cuda.device_count())


class RayExecutor:
    """Ray: the cluster at RAY_ADDRESS or on this machine, otherwise a new one. All nodes share the folders.

    Ray restarts a run whose worker or machine was lost.
    """

    def __init__(self, gpus: float = 0.0):
        try:
            import ray
        except ImportError as error:
            raise ConfigError("the executor ray needs Ray: pip install 'medi3d[ray]'") from error
        self.ray, self.gpus = ray, gpus

    def __call__(self, cells: Sequence[Cell], folder: Path) -> Iterator[Outcome]:
        """Compute `cells`."""
        if not self.ray.is_initialized():
            named = {key: value for key, value in os.environ.items() if key.startswith("MEDI3D_")}
            environment = {"env_vars": {**named, "OMP_WAIT_POLICY": "PASSIVE"}}
            self.ray.init(log_to_driver=False, runtime_env=environment)
        remote = self.ray.remote(_run_on_ray)
        running = {}
        for cell in cells:
            needs = {"num_cpus": cell.threads, "num_gpus": self.gpus, "max_retries": ATTEMPTS}
            running[remote.options(**needs).remote(cell, folder.absolute(), Path.cwd())] = cell
        while running:
            (done, *_), _ = self.ray.wait(list(running))
            cell = running.pop(done)
            try:
                yield cell, self.ray.get(done)
            except self.ray.exceptions.RayError as error:
                yield cell, f"lost by Ray: {first_line(error)}"


def _run_on_ray(cell: Cell, folder: Path, directory: Path) -> str | None:
    os.chdir(directory)  # paths in the config are relative to the caller's directory
    become_worker(cell.threads)
    return run_cell(cell, folder)


EXECUTORS = ("local", "ray")


def create_executor(name: str, workers: int | None, gpus: float) -> Executor:
    """The executor of that name.

    Raises:
        ConfigError: it is unknown, not installed, or does not take `workers`.
    """
    if name == "local":
        return LocalExecutor(workers)
    if name == "ray":
        if workers is not None:
            raise ConfigError("--workers is for the executor local; Ray has its own")
        return RayExecutor(gpus)
    raise ConfigError(f"--executor is {name!r}: one of {', '.join(EXECUTORS)}")
