"""The machine and the versions that produced a result."""

import os
import platform
from importlib import metadata
from typing import Any

import psutil
import torch

from medi3d.engine.precision import has_fast_bf16

PACKAGES = (
    "medi3d",
    "torch",
    "timm",
    "monai",
    "pytorch-ignite",
    "torchio",
    "SimpleITK",
    "nibabel",
    "numpy",
    "scipy",
    "omegaconf",
    "safetensors",
    "av",
    "opencv-contrib-python-headless",
    "pydicom",
)


def versions() -> dict[str, str | None]:
    """Installed version of each package that results depend on; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def devices() -> list[dict[str, Any]]:
    """What torch can compute on: name, memory in GB, and whether bfloat16 is fast there."""
    cpu: dict[str, Any] = {
        "device": "cpu",
        "name": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "fast_bf16": has_fast_bf16(torch.device("cpu")),
    }
    gpus = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        device = torch.device("cuda", index)
        memory = round(facts.total_memory / 2**30, 1)
        fast = has_fast_bf16(device)
        gpus.append({"device": str(device), "name": facts.name, "memory_gb": memory, "fast_bf16": fast})
    return [cpu, *gpus]


def describe() -> dict[str, Any]:
    """Everything for `environment.json`: versions, system, processors, threads, devices."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "devices": devices(),
        "versions": versions(),
    }
