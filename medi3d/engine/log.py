"""Log messages: on the terminal, and in a run's `log.txt`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from medi3d.engine import distributed
from medi3d.errors import printable

log = logging.getLogger("medi3d")
screen = Console(stderr=True)
"""Shows progress; standard output is for results."""


@contextmanager
def shown_log(path: Path | None = None) -> Iterator[None]:
    """Inside, the log is shown on `screen` and added to `path`, by one of several processes."""
    if not distributed.is_writer():
        yield
        return
    handlers = [_screen(), *([_file(path)] if path else [])]
    level = log.level
    log.setLevel(logging.INFO)
    for handler in handlers:
        handler.addFilter(_printable)
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def _printable(record: logging.LogRecord) -> bool:
    """File names in a message must not obey on the terminal."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def _screen() -> logging.Handler:
    if screen.is_terminal:  # through rich, so that lines stay above a progress bar
        return RichHandler(console=screen, show_time=False, show_level=False, show_path=False)
    return logging.StreamHandler(screen.file)


def _file(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler
