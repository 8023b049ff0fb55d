"""What works on this machine: versions, devices, operators, memory, disk, worker processes, weights."""

import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medi3d.engine.environment import describe
from medi3d.engine.precision import Precision
from medi3d.errors import WeightsError, first_line
from medi3d.weights.catalogue import find_weights, list_weights

Finding = dict[str, Any]
"""Keys "what", "found" and "good" (True, False, or None: neither)."""

LOW_DISK_GB, LOW_MEMORY_GB = 5, 4


def examine() -> list[Finding]:
    """All findings, in the order in which they are shown."""
    facts = describe()
    findings = [_finding("python", facts["python"]), _finding("system", facts["system"])]
    findings += [_finding(name, version or "not installed") for name, version in facts["versions"].items()]
    for device in facts["devices"]:
        found = (
            f"{device['name']}, {device['memory_gb']} GB, bf16 {'fast' if device['fast_bf16'] else 'slow'}"
        )
        findings.append(_finding(device["device"], found))
        findings.append(_operators(torch.device(device["device"])))
    findings.append(_finding("threads", f"{facts['threads']} on {facts['cores']} cores"))
    return [*findings, _memory(), _disk(), _workers(), *_weights()]


def _finding(what: str, found: Any, good: bool | None = None) -> Finding:
    return {"what": what, "found": str(found), "good": good}


def _operators(device: torch.device) -> Finding:
    """A training step of what inflated networks are made of, with channels-last memory and bfloat16."""
    layers = (nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.Conv3d(8, 8, 3, groups=8), nn.MaxPool3d(2))
    precision = Precision(device, bf16=True)
    network = precision.place_network(nn.Sequential(*layers))
    what = f"{device}: 3D operators, bf16 with channels last"
    try:
        with precision.autocast():
            loss = network(precision.place(torch.randn(1, 1, 12, 12, 12))).float().square().mean()
        loss.backward()
    except RuntimeError as error:
        return _finding(what, first_line(error), False)
    return _finding(
        what, "work" if bool(torch.isfinite(loss)) else "give no number", bool(torch.isfinite(loss))
    )


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    return _finding("free memory", f"{free:.1f} GB", free >= LOW_MEMORY_GB)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return _finding("free disk here", f"{free:.1f} GB", free >= LOW_DISK_GB)


def _workers() -> Finding:
    method = multiprocessing.get_start_method()
    return _finding("start of worker processes", method, method == "fork" or None)


def _weights() -> list[Finding]:
    where = os.environ.get("MEDI3D_WEIGHTS_PATH", "not set")
    findings = [_finding("MEDI3D_WEIGHTS_PATH", where)]
    for row in list_weights():
        try:
            found: Any = find_weights(row)
        except WeightsError as error:
            found = error
        findings.append(_finding(f"weights {row.name}", found))
    return findings
