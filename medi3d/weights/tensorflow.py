"""Read TensorFlow's checkpoints (version 2: `NAME.index` and `NAME.data-00000-of-00001`) without TensorFlow.

The index is a LevelDB table of sorted keys: blocks of entries that share prefixes with the one before, each
block followed by its compression and CRC-32C, and a footer with the location of the block of blocks
(tensorflow/core/lib/io/format.cc, block.cc). The values are two small protocol buffers, BundleHeaderProto and
BundleEntryProto (tensorflow/core/protobuf/tensor_bundle.proto), of which only the needed fields are read
here. Nothing in the files is run; every length is checked, and every block and every tensor against its
checksum.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medi3d.errors import WeightsError
from medi3d.weights.crc32c import masked_crc32c

_FOOTER, _TRAILER = 48, 5
_MAGIC = 0xDB4775248B80FB57
_TYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 19: np.float16}
_VARINT, _BYTES, _FIXED = 0, 2, 5


@dataclass(frozen=True)
class Variable:
    """One variable of an index: the location of its bytes in the data file."""

    dtype: int
    """TensorFlow's number of the type; 1 is float32."""
    shape: tuple[int, ...]
    offset: int
    size: int
    """In bytes."""
    crc32c: int
    """Checksum of these bytes, masked as in TensorFlow."""


def read_index(path: str | Path) -> dict[str, Variable]:
    """The variables that a `.index` file lists, by name.

    Raises:
        WeightsError: the file is missing, damaged, compressed, or of a checkpoint in several parts.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot read the index of the checkpoint ({error.strerror})") from error
    try:
        entries = dict(_read_table(content))
        parts = next((v for n, k, v in _fields(entries.pop(b"")) if (n, k) == (1, _VARINT)), 0)
        if parts != 1:
            raise ValueError(f"the checkpoint is in {parts!r} parts, only one can be read")
        return {name.decode(): _variable(value) for name, value in entries.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not a whole TensorFlow index ({error})") from error


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, given by its `.index` file, as published: kernels are (t, h, w, in, out).

    Raises:
        WeightsError: see `read_index`; or the data file is missing or truncated, or a tensor does not match
            its checksum in the index.
    """
    path = Path(path)
    variables = read_index(path)
    data = path.with_suffix(".data-00000-of-00001")
    if not data.is_file():
        raise WeightsError(f"{path}: the tensors are not next to it, {data.name} is missing")
    with data.open("rb") as file:
        length = file.seek(0, 2)
        tensors = {}
        for name, variable in variables.items():
            if variable.offset + variable.size > length:
                raise WeightsError(f"{data}: truncated, {name} would end after its {length} bytes")
            file.seek(variable.offset)
            tensors[name] = _tensor(file.read(variable.size), name, variable, data)
    return tensors


def _tensor(content: bytes, name: str, variable: Variable, data: Path) -> Tensor:
    if variable.dtype not in _TYPES:
        raise WeightsError(f"{data}: {name} is of TensorFlow's type {variable.dtype}, which is not read")
    kind = np.dtype(_TYPES[variable.dtype]).newbyteorder("<")
    if math.prod(variable.shape) * kind.itemsize != variable.size:
        raise WeightsError(f"{data}: {name} has {variable.size} bytes, which do not fit {variable.shape}")
    if masked_crc32c(content) != variable.crc32c:
        raise WeightsError(f"{data}: {name} does not match its checksum in the index: it is damaged")
    array = np.frombuffer(content, kind).reshape(variable.shape)
    return torch.from_numpy(array.astype(kind.newbyteorder("=")))


def _read_table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(content) < _FOOTER or int.from_bytes(content[-8:], "little") != _MAGIC:
        raise ValueError("its end is not that of a table")
    footer = content[-_FOOTER:]
    _, at = _handle(footer, 0)  # the block of filters, which is empty
    index, _ = _handle(footer, at)
    for _, handle in _read_block(content, *index):
        yield from _read_block(content, *_handle(handle, 0)[0])


def _read_block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    end = offset + size
    trailer = content[end : end + _TRAILER]
    if len(trailer) < _TRAILER:
        raise ValueError("a block extends past its end")
    if trailer[0]:
        raise ValueError("it is compressed, unlike TensorFlow's own")
    if masked_crc32c(content[offset : end + 1]) != int.from_bytes(trailer[1:], "little"):
        raise ValueError("a block does not match its checksum: the file is damaged")
    block = content[offset:end]
    restarts = int.from_bytes(block[-4:], "little")
    entries, at, key = block[: len(block) - 4 * (restarts + 1)], 0, b""
    while at < len(entries):
        shared, at = _varint(entries, at)
        fresh, at = _varint(entries, at)
        length, at = _varint(entries, at)
        if shared > len(key) or at + fresh + length > len(entries):
            raise ValueError("an entry extends past its block")
        key = key[:shared] + entries[at : at + fresh]
        at += fresh
        yield key, entries[at : at + length]
        at += length


def _handle(content: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block."""
    offset, at = _varint(content, at)
    size, at = _varint(content, at)
    return (offset, size), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is longer than 64 bits")


def _fields(message: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Field number, wire type and value of every field of a protocol buffer."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _varint(message, at)
        elif kind in (_BYTES, _FIXED):
            length, at = _varint(message, at) if kind == _BYTES else (4, at)
            value, at = message[at : at + length], at + length
            if at > len(message):
                raise ValueError("a field extends past its message")
        else:
            raise ValueError(f"a field has wire type {kind}")
        yield tag >> 3, kind, value


def _variable(message: bytes) -> Variable:
    found: dict[int, int | bytes] = {1: 0, 2: b"", 3: 0, 4: 0, 5: 0, 6: b"\0\0\0\0"}
    for number, _, value in _fields(message):
        if number == 7:
            raise ValueError("a variable is in slices, which are not read")
        found[number] = value
    dtype, shape, shard, offset, size, crc = (found[number] for number in range(1, 7))
    if shard or not isinstance(shape, bytes) or not isinstance(crc, bytes):
        raise ValueError("the description of a variable has unexpected types")
    sizes = [_size(value) for number, _, value in _fields(shape) if number == 2 and isinstance(value, bytes)]
    return Variable(int(dtype), tuple(sizes), int(offset), int(size), int.from_bytes(crc, "little"))


def _size(dimension: bytes) -> int:
    return next((int(value) for number, _, value in _fields(dimension) if number == 1), 0)
