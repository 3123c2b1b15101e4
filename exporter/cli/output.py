# SPDX-License-Identifier: Apache-2.0
"""What commands print: tables for people, JSON for machines, progress for those who wait at a terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

_ENDLESS = 10_000  # columns of a terminal

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
DeviceOption = Annotated[str, typer.Option(help="Target to run on; `auto` takes the first that is present.")]
PrecisionOption = Annotated[
    str | None, typer.Option(help="Engine of this precision (fp32, fp16, bf16); by default the one built last.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads of the engine; it decides where none are given.")]
BundleArgument = Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle, as `export` writes it.")]


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "", turns: bool = False
) -> None:
    """A table as wide as it needs to be; columns named with a trailing ``>`` are right-aligned.

    One that ``turns`` has a row a column where the terminal is too narrow for it.
    """
    from rich.console import Console
    from rich.measure import Measurement

    # Piped to a file there is no width to fit into, and a table folded at 80 columns is hard to read.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    rows = list(rows)
    table = _table(title, columns, rows, note)
    if turns and Measurement.get(console, console.options.update(width=_ENDLESS), table).maximum > console.width:
        head, *rest = zip(columns, *rows, strict=True)
        turned = [(name.rstrip(">"), *cells) for name, *cells in rest]
        table = _table(title, [head[0], *(f"{cell}>" for cell in head[1:])], turned, note)
    console.print(table)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=Text(note) if note else None,
        caption_justify="left",
    )
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


@contextlib.contextmanager
def progress_bar(what: str, quiet: bool = False) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on standard error that appears after two seconds; nothing where that is not a terminal.

    Gives ``update(description, done, total)``.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda description, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    )
    task = progress.add_task(what, total=None)
    timer = threading.Timer(2.0, progress.start)
    timer.daemon = True
    timer.start()

    def update(description: str, done: int, total: int | None) -> None:
        progress.update(task, description=description, completed=done, total=total)

    try:
        yield update
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


def mebibytes(size: float) -> str:
    """Bytes as MiB, of less than a tenth of one as KiB."""
    if 0 < size < 0.1 * 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**20:,.1f} MiB"


def count(number: float) -> str:
    """1,234,567 as 1.23 M."""
    for power, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= power:
            return f"{number / power:.2f}{suffix}"
    return f"{number:g} "


def shape(dims: Sequence[int | str]) -> str:
    """1 × 3 × 224 × 224."""
    return " × ".join(str(dim) for dim in dims)
