"""Messages: what a name of a file may hold does not reach the terminal as a command."""

import pytest

from medi3d.errors import first_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("scan.nii.gz", "scan.nii.gz"),
        ("Größe × µm", "Größe × µm"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("a\rb", r"a\rb"),
        (b"a\xff".decode(errors="surrogateescape"), r"a\udcff"),
        ("two\nlines", "two\nlines"),
    ],
    ids=["plain", "letters", "escape", "return", "no text", "lines"],
)
def test_text_is_shown_and_not_obeyed(text, shown):
    assert printable(text) == shown
    printable(text).encode()


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("a\nb"), "a"), (ValueError(""), "ValueError"), (ValueError("x" * 300), "x" * 200)],
    ids=["lines", "silent", "long"],
)
def test_first_line(error, line):
    assert first_line(error) == line
