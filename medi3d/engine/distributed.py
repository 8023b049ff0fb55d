"""Several processes that train one network (torchrun). With one process all of it does nothing."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")

PATIENCE = timedelta(hours=24)
"""How long processes wait for each other: the first one scores the cases of a fold alone."""


def ranks() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_writer() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def local_device() -> torch.device:
    """The device of this process: its own GPU, or the CPU where there is none."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def joined_processes() -> Iterator[torch.device]:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs); returns this one's device."""
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def gather(value: T) -> list[T]:
    """`value` of every process, in the order of ranks; every process gets the list."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Wait until every process is here."""
    if ranks() > 1:
        dist.barrier()


def share_buffers(network: nn.Module) -> None:
    """Give every process the buffers (running statistics) of rank 0, so that all validate one network."""
    if ranks() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def wrap(network: nn.Module) -> nn.Module:
    """`network` with its gradients averaged over the processes; unchanged with one process."""
    if ranks() == 1:
        return network
    device = next(network.parameters()).device
    return nn.parallel.DistributedDataParallel(
        network, device_ids=[device] if device.type == "cuda" else None
    )
