# SPDX-License-Identifier: Apache-2.0
"""Shared by all commands: options, tables, JSON, progress bars and checks of files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

import typer

from perceiver_export.runtimes.errors import InputError, UsageError, printable
from perceiver_export.runtimes.files import check_writable, encode_json, replacing, write_bytes, writing

if TYPE_CHECKING:
    from perceiver_export.runtimes.manifest import OutputKind, TensorSpec

_STEERING = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_LEAST = 8  # columns that a name gets at least
_NARROWEST = 20  # columns; a narrower terminal is treated as this wide
_PROSE = 80  # columns, even in a wider terminal
_BETWEEN_PARTS = re.compile(r"(?<=\w[./_:-])(?=[^\W\d_])|(?<=/)(?=\w)")  # encoder. self_ attentions.0. mlp
_COMMAND = re.compile(r"\b(?:perceiver-export|sudo|pip|docker|tritonserver) (?=[a-z-])[^;`]*[^;`\s]")
_QUOTED = re.compile(r"'[^']*'")
_LEFT_OUT = ("note:", "next:", "details:", "written:")  # by --quiet
_VERDICT = re.compile("(error|hint|warning|[A-Z].*):")  # what --quiet keeps of a command that writes files
_NO_DATA = (".html", ".json", ".md", ".xml")  # outputs of commands, which are never samples
_KINDS = {
    "single-label": "mutually exclusive labels (softmax)",
    "multi-label": "independent labels (sigmoid)",
    "regression": "raw values",
}

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Print only answers, warnings and errors.")]
BundleArgument = Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle's directory.")]


def options_of(*kinds: type[Any], **parse: Callable[[str], tuple[str, Any]]) -> Callable[..., Any]:
    """Decorate a command: a parameter whose type is in ``kinds`` becomes one option per field that has a ``doc``.

    A field's metadata hold the help (``doc``) and the metavar (``value``). A mapping takes several NAME=VALUE, parsed
    by the function of its name in ``parse``. A nested dataclass contributes the options of its own fields. ``output``
    is also -o.
    """
    fields = [found for kind in kinds for found in _flat(kind)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters = {name: one for name, one in signature.parameters.items() if one.annotation in kinds}

        @functools.wraps(command)
        def run(*arguments: Any, **given: Any) -> None:
            values = {field.name: given.pop(field.name) for field, _ in fields}
            for name, read in parse.items():
                pairs = [read(text) for text in values[name] or ()]
                values[name] = dict(pairs)
                if twice := sorted({key for key, _ in pairs if [one for one, _ in pairs].count(key) > 1}):
                    raise UsageError(f"--{name} gives {', '.join(twice)} twice", "give each name once")
            built = {name: _built(one.annotation, values) for name, one in parameters.items()}
            command(*arguments, **given, **built)

        others = [one for name, one in signature.parameters.items() if name not in parameters]
        made = [_parameter(field, hint) for field, hint in fields]
        run.__signature__ = signature.replace(parameters=[*others, *made])  # type: ignore[attr-defined]
        return run

    return decorate


def _flat(kind: type[Any]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields with a ``doc``, nested ones included, and their types."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _flat(hints[field.name])
        elif "doc" in field.metadata:
            yield field, hints[field.name]


def _built(kind: type[Any], values: dict[str, Any]) -> Any:
    hints, own = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        nested = dataclasses.is_dataclass(hints[field.name])
        value = _built(hints[field.name], values) if nested else values.get(field.name)
        if value is not None:
            own[field.name] = value
    return kind(**own)


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    flag, default, metavar = f"--{field.name.replace('_', '-')}", field.default, field.metadata.get("value")
    kind: Any = hint
    if default is dataclasses.MISSING:  # a mapping or a sequence
        kind, default, metavar = list[str] | None, None, metavar or "NAME=VALUE"
    elif hint in (bool, bool | None):
        flag = flag if default is False else f"{flag}/{flag.replace('--', '--no-', 1)}"
    elif hint not in (int, int | None, float, float | None, Path | None):
        kind, default = (str | None, None) if default is None else (str, str(default))
    flags = [flag, "-o"] if field.name == "output" else [flag]
    annotation = Annotated[kind, typer.Option(*flags, metavar=metavar, help=field.metadata.get("doc"))]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


class _Quiet:
    """Suppressed output. --quiet sets ``notes`` and, in a command that writes files, ``answers`` (except the verdict).

    --json sets ``all``: everything except errors, warnings on standard error, and the document of `print_json`.
    """

    notes = answers = all = False


@contextlib.contextmanager
def quiet(notes: bool = False, answers: bool = False, json: bool = False) -> Iterator[None]:
    """Suppress these, also in commands that the command runs."""
    before = _Quiet.notes, _Quiet.answers, _Quiet.all
    _Quiet.notes, _Quiet.answers, _Quiet.all = before[0] or notes, before[1] or answers, before[2] or json
    try:
        yield
    finally:
        _Quiet.notes, _Quiet.answers, _Quiet.all = before


def shows_text() -> bool:
    """Whether text is printed, not only the document of --json."""
    return not _Quiet.all


def say(text: str, mark: str = "", colour: str = "yellow", *, err: bool = False) -> None:
    """Print wrapped lines after a coloured ``mark``."""
    if _Quiet.all and not err:
        return
    if not (_Quiet.answers and not _VERDICT.fullmatch(mark)) and not (_Quiet.notes and mark in _LEFT_OUT):
        shown = wrapped(f"{mark} {text}", len(mark) + 1) if mark else wrapped(text)
        typer.echo(typer.style(mark, fg=colour, bold=True) + shown[len(mark) :] if mark else shown, err=err)


def wrapped(text: str, indent: int = 0) -> str:
    """Lines of at most 80 columns with control characters escaped; no word, such as a path, is broken.

    A command that wraps can still be copied, because each of its broken lines ends with a backslash.
    """
    width, lines = min(_columns(), _PROSE), list[str]()
    for line in map(printable, text.split("\n")):
        command = _COMMAND.search(line)
        line = _QUOTED.sub(lambda quoted: quoted[0].replace(" ", "\0"), line) if command else line
        further, at = " " * (indent or len(line) - len(line.lstrip())), 0
        fill = textwrap.TextWrapper(width - 2, "", further, break_long_words=False, break_on_hyphens=False)
        for part in fill.wrap(line) or [""]:
            at = line.find(part.strip(), at) + len(part.strip())
            goes_on = command is not None and command.start() < at < command.end()
            lines.append(part.replace("\0", " ") + " \\" * goes_on)
    return "\n".join(lines)


def _columns() -> int:
    """The width of the terminal, but at least `_NARROWEST`."""
    return max(shutil.get_terminal_size().columns, _NARROWEST)


def show_written(*paths: str | os.PathLike[str] | None) -> None:
    """List what a command wrote, with versions; None is an output that was not requested."""
    from importlib.metadata import version

    from perceiver_export.runtimes.manifest import SCHEMA_VERSION

    for path in (Path(one) for one in paths if one is not None):
        bundle = (path / "manifest.json").is_file()
        what = f"bundle of schema {SCHEMA_VERSION}, " if bundle else ""
        say(f"{path} ({what}by perceiver-export {version('perceiver-export')})", "written:")


def print_json(value: Any) -> None:
    """With --json, one JSON document on standard output."""
    if not _Quiet.all:
        return
    # JSON escapes only some of the control characters.
    document = encode_json(value).decode()
    typer.echo(_STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", document), nl=False)


def print_text(text: str) -> None:
    """Print a text with its own line breaks, and control characters escaped."""
    if not _Quiet.all:
        typer.echo(_escaped(text))


def _escaped(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


class Table(NamedTuple):
    """Arguments of `print_table`; without a title, `run` shows the bundle and where it ran."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> None:
    """Print a table; a column whose name ends in ``>`` holds figures, right-aligned.

    In a narrow terminal, names fold between their parts. Figures never fold: if they are too wide, each row becomes a
    paragraph. A pipe has 80 columns.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if _Quiet.answers or _Quiet.all:
        return
    console = Console(highlight=False, width=_columns())
    figures = [name.endswith(">") for name in columns]
    cells = whole = [[_escaped(cell) for cell in row] for row in ([name.rstrip(">") for name in columns], *rows)]
    room = console.width - 2 * (len(columns) - 1)
    if sum(_widths(cells)) > room:
        cells = _narrowed(cells, figures, room)
    least = sum(width if exact else min(_LEAST, width) for exact, width in zip(figures, _widths(cells), strict=True))
    if title:
        typer.secho(wrapped(title), bold=True)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for exact, header in zip(figures, cells[0], strict=True):
        justify: Literal["right", "left"] = "right" if exact else "left"
        table.add_column(Text(header), justify=justify, overflow="fold", no_wrap=exact)
    for row in cells[1:]:
        table.add_row(*map(Text, row))
    if least > room:
        for row in whole[1:]:
            said = "; ".join(f"{name} {cell}" for name, cell in zip(whole[0], row, strict=True) if cell)
            typer.echo(wrapped(" ".join(said.split()), 2))
    else:
        with console.capture() as drawn:
            console.print(table)
        typer.echo("\n".join(map(str.rstrip, drawn.get().splitlines())))
    if note and not _Quiet.notes:
        typer.echo(wrapped(note))


def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
    return [_widest(column) for column in zip(*cells, strict=True)]


def _widest(column: Iterable[str]) -> int:
    return max(len(line) for cell in column for line in cell.split("\n"))


def _narrowed(cells: Sequence[Sequence[str]], figures: Sequence[bool], width: int) -> list[list[str]]:
    """The cells, with one word per line in the headers of figures, and with long words in names folded.

    ``figures``: whether each column holds figures. ``width``: characters of all columns together.
    """
    columns = list(zip(*cells, strict=True))
    for index, (header, *rest) in enumerate(columns):
        if figures[index]:
            columns[index] = (header.replace(" ", "\n"), *rest)
            width -= _widest(columns[index])
    texts = sorted((index for index, one in enumerate(figures) if not one), key=lambda one: _widest(columns[one]))
    for place, index in enumerate(texts):  # those that need less leave the rest to the others
        most = max(width // (len(texts) - place), _LEAST)
        columns[index] = tuple(_folded(cell, most) for cell in columns[index])
        width -= min(_widest(columns[index]), most)
    return [list(row) for row in zip(*columns, strict=True)]


def _folded(cell: str, width: int) -> str:
    """The cell with long words folded between their parts."""

    def broken(word: re.Match[str]) -> str:
        lines = [""]
        for part in _BETWEEN_PARTS.split(word[0]):
            if lines[-1] and len(lines[-1]) + len(part) > width:
                lines.append("")
            lines[-1] += part
        return "\n".join(lines)

    return re.sub(rf"\S{{{width + 1},}}", broken, cell)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a bar on standard error after two seconds, if it is a terminal.

    Yields ``update(description, done, total)``.
    """
    if _Quiet.all or _Quiet.notes or not sys.stderr.isatty():
        yield lambda description, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(what, total=None)
    timer = threading.Timer(2.0, progress.start)
    timer.daemon = True
    timer.start()

    def update(description: str, done: int, total: int | None) -> None:
        if progress.tasks[0].finished:  # the next of several tasks starts
            progress.reset(task)
        progress.update(task, description=description, completed=done, total=total)

    try:
        yield update
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


def mebibytes(size: float) -> str:
    """Bytes as MiB, or below 0.1 MiB as KiB."""
    return f"{size / 2**10:.1f} KiB" if 0 < size < 0.1 * 2**20 else f"{size / 2**20:,.1f} MiB"


def unit(number: float) -> tuple[float, str]:
    """The power of ten to divide by and its letter, as 1e6 and M; 1 below a thousand."""
    return next((one for one in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= one[0]), (1.0, ""))


def count(number: float) -> str:
    """1,234,567 as 1.23 M."""
    power, letter = unit(number)
    return f"{number / power:.2f} {letter}" if letter else f"{number:g} "


def shape(dims: Sequence[int | str]) -> str:
    """1 × 3 × 224 × 224."""
    return " × ".join(map(str, dims))


def described(spec: TensorSpec, kinds: Mapping[str, OutputKind]) -> str:
    """A tensor's name, type, shape and meaning; ``kinds``: those of the outputs, by name."""
    meanings = (spec.meaning, _KINDS.get(kinds.get(spec.name, ""), ""))
    return ", ".join(filter(None, (f"{spec.name}: {spec.dtype} {shape(spec.shape)}", *meanings)))


def pair(text: str, option: str, example: str) -> tuple[str, str]:
    """NAME=VALUE -> (NAME, VALUE). Raises UsageError."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UsageError(f"{option} {text!r} is not NAME=VALUE", f"give {option} {example}, for example")
    return name, value


def check_file(path: Path) -> None:
    """Raise InputError for a file that cannot be written, before a model runs for minutes."""
    check_writable(path, InputError, "choose another file")
    if path.is_dir() or not path.absolute().parent.is_dir():
        found = f"{path} cannot be written: it is a directory, or its folder does not exist"
        raise InputError(found, "name a file in an existing folder")


def check_output(path: Path, read: Iterable[str | os.PathLike[str] | None], ending: str | None = None) -> None:
    """Raise UsageError for an output that would overwrite an input, lies in a bundle, or has another ``ending``.

    ``read``: the inputs as typed, which are files, directories of samples, text, or None. With an ``ending`` the output
    is a file, so `check_file` checks it too.
    """
    from perceiver_export.calibration.bundles import enclosing_bundle

    for one in read:
        if one is None or not os.path.exists(one):  # text, and module:function
            continue
        place, source = path.resolve(), Path(one).resolve()
        sample = os.path.isfile(path) and source in place.parents and path.suffix.lower() not in _NO_DATA
        if place == source or sample:
            raise UsageError(f"{path} is an input of this command and would be overwritten", "choose another path")
    if ending is not None and path.suffix.lower() != ending:
        named = path / f"NAME{ending}" if os.path.isdir(path) else path.with_suffix(ending)
        raise UsageError(f"{path} does not end in {ending}", f"name a file that does: {named}")
    if (bundle := enclosing_bundle(path)) is not None:
        raise UsageError(f"{path} lies inside the bundle {bundle}", "choose a path outside of it")
    if ending is not None:
        check_file(path)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same ending; once written, it replaces ``path``. Raises InputError."""
    with writing(path, InputError, "choose another file"), replacing(path) as temporary:
        yield temporary


def write_json(path: Path, document: Any) -> None:
    """Write a document as indented JSON. Raises InputError."""
    write_bytes(path, encode_json(document), InputError, "choose another file")
