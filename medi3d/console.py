"""Tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medi3d.errors import printable

console = Console()


def print_facts(title: str, facts: dict[str, Any]) -> None:
    """Keys and values, one per line."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # show checksums in full
    for key, value in facts.items():
        if value not in (None, "", (), {}):
            table.add_row(key, escape(printable(str(value))))
    console.print(table)


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same columns; booleans as yes and no."""
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "[green]yes[/]" if value else "[red]no[/]"
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else escape(printable(str(value)))


def compact_table(title: str) -> Table:
    """A table without frames, so that many columns fit into 80 characters."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
