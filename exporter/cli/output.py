# SPDX-License-Identifier: Apache-2.0
"""What commands print: tables for people, JSON for machines, progress for those who wait at a terminal."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, JustifyMethod
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

_ENDLESS = 10_000  # columns of a terminal
_LEAST = 8  # columns of a terminal that are left for a name
_BETWEEN_PARTS = re.compile(r"(?<=\w[./_:-])(?=[^\W\d_])|(?<=/)(?=\w)")  # encoder. self_ attentions.0. mlp

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
    """A table as wide as it needs to be; columns named with a trailing ``>`` are figures, right-aligned.

    Where the terminal is too narrow for it, names are folded between their parts, and figures not at all; one that
    ``turns`` has a row a column instead.
    """
    from rich.console import Console
    from rich.measure import Measurement

    # Piped to a file there is no width to fit into, and a table folded at 80 columns is hard to read.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    rows = list(rows)

    def fits(table: Table) -> bool:
        return Measurement.get(console, console.options.update(width=_ENDLESS), table).maximum <= console.width

    table = _table(title, columns, rows, note)
    if turns and not fits(table):
        head, *rest = zip(columns, *rows, strict=True)
        columns = [head[0], *(f"{cell}>" for cell in head[1:])]
        rows = [(name.rstrip(">"), *cells) for name, *cells in rest]
        table = _table(title, columns, rows, note)
    if not fits(table):
        table = _table(title, columns, rows, note, console.width)
    console.print(table)


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str, width: int | None = None
) -> Table:
    """``width``: what it must be made to fit into."""
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=Text(note) if note else None,
        caption_justify="left",
    )
    whole = {} if width is None else _figures(columns, rows, width)
    for index, column in enumerate(columns):
        name, justify = column.rstrip(">"), "right" if column.endswith(">") else "left"
        header = "\n".join(_folded(name, whole.get(index, _ENDLESS)))
        table.add_column(header, justify=cast("JustifyMethod", justify), overflow="fold", no_wrap=index in whole)
    for row in rows:
        cells = enumerate(row)
        table.add_row(*(Text(cell) if width is None or index in whole else _Name(cell) for index, cell in cells))
    return table


def _figures(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> dict[int, int]:
    """Of columns that need not be folded, index and width; none where too little would be left for the others."""
    found = {
        index: max(len(text) for text in (*name.rstrip(">").split(), *(row[index] for row in rows), ""))
        for index, name in enumerate(columns)
        if name.endswith(">")
    }
    left = width - sum(found.values()) - 3 * len(columns) - 1
    return found if left >= _LEAST * (len(columns) - len(found)) else {}


class _Name:
    """A cell of a table that is folded between words, and words that are too long between their parts."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement
        from rich.text import Text

        return Measurement.get(console, options, Text(self._text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        lines = (part for line in self._text.split("\n") for part in _folded(line, options.max_width))
        yield Text("\n".join(lines), overflow="fold")


def _folded(line: str, width: int) -> list[str]:
    lines = [""]
    for word in re.findall(r"\s*\S+", line):
        for part in [word] if len(word.strip()) <= width else _BETWEEN_PARTS.split(word):
            if lines[-1] and len(lines[-1]) + len(part) > width:
                lines.append(part.lstrip())
            else:
                lines[-1] += part
    return lines


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
