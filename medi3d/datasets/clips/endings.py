"""Check that a clip is complete, for containers that do not state their number of frames.

Decoders stop silently where such a file was cut. Matroska and WebM state the length of each element
(RFC 8794, RFC 9559), a transport stream is made of packets of one length (ISO/IEC 13818-1), and in others the
last picture is damaged or comes before the end stated in the header.
"""

from pathlib import Path
from typing import Any, BinaryIO

from medi3d.errors import DataError

_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_PACKETS = (188, 192, 204)
"""Bytes of a packet of a transport stream: plain, with a time stamp (M2TS), with error correction."""
_SYNC = 0x47
_PROMISES_DURATION = ("flv",)
_LOST = 0.05


def check_end(path: Path, container: str) -> None:
    """Raise if a file ends inside an element or a packet.

    Args:
        path: of the file.
        container: FFmpeg's name of its format.

    Raises:
        DataError: it does; the message gives the number of bytes.
    """
    size = path.stat().st_size
    if "matroska" in container:
        with path.open("rb") as file:
            end = _last_end(file, size)
        if end > size:
            raise DataError(f"{path}: cut short, {size} of at least {end} bytes are there")
    elif container == "mpegts" and not _whole_packets(path, size):
        raise DataError(f"{path}: cut short, it ends inside of a packet ({size} bytes)")


def ends_early(container: Any, stream: Any, last: Any) -> bool:
    """Whether the last picture is damaged, or the header states a later end than its time."""
    if last.is_corrupt:
        return True
    alone = len(container.streams) == 1
    if not (
        alone and container.format.name in _PROMISES_DURATION and container.duration and last.pts is not None
    ):
        return False
    import av

    rate = stream.average_rate or stream.guessed_rate
    pace = float(1 / rate) if rate else 0.0
    promised = container.duration / av.time_base
    return float(last.pts * last.time_base) + pace < promised * (1 - _LOST)


def _last_end(file: BinaryIO, size: int) -> int:
    """Where the last element ends; elements without a length, as in live recordings, are entered."""
    position = end = 0
    while position < size:
        file.seek(position)
        name, told = _number(file, keep_mark=True), _number(file)
        if name is None or told is None:
            return size + 1  # it ends inside an element's head
        start = file.tell()
        if told < 0:
            if name not in (_SEGMENT, _CLUSTER):
                return end
            position = end = start
            continue
        position = end = start + told
    return end


def _number(file: BinaryIO, *, keep_mark: bool = False) -> int | None:
    """A number of variable length; -1 if it is marked as unknown, None at the end of the file."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    rest = file.read(length - 1)
    if len(rest) < length - 1:
        return None
    value = int.from_bytes(first + rest, "big")
    if keep_mark:
        return value
    value -= 1 << (7 * length)
    return -1 if value == (1 << (7 * length)) - 1 else value


def _whole_packets(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        start = file.read(3 * max(_PACKETS) + 4)
    for length in _PACKETS:
        first = 4 if length == 192 else 0
        marks = start[first::length]
        if len(marks) > 1 and all(mark == _SYNC for mark in marks):
            return size % length == 0
    return True  # it begins inside a packet, as a part of a broadcast may
