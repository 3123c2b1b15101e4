# SPDX-License-Identifier: Apache-2.0
"""Shared by all benchmarks: options, a working folder, fresh processes, sides that take turns, and a table.

    python -m tests.benchmarks.NAME [--help] [--json] [--page] [--work DIR]

A benchmark is a function that yields rows. Its keyword parameters are the command's options.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
FASHION = REPOSITORY / "examples" / "fashion_mnist"
RESULTS = REPOSITORY / "docs" / "results"
END = "<!-- end -->\n"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # fresh processes use compiled modules, as in an installation
Row = dict[str, Any]
T = TypeVar("T")
_VERSIONS = ("torch", "onnx", "onnxruntime", "openvino", "transformers")
_CALL = """
import importlib, json, sys
module, name, arguments = json.load(sys.stdin)
print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))
"""


def command(measure: Callable[..., Iterable[Row]]) -> None:
    """Run ``measure(work, **options)`` and print each row as it comes; exit with 1 if a row says ``"held": False``.

    Keyword parameters become options of their default's type; a tuple ``presets`` becomes the arguments.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules[measure.__module__].__doc__,
        epilog=_write_page.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print all rows as JSON at the end")
    parser.add_argument("--page", action="store_true", help="write the results page: see below")
    parser.add_argument("--work", type=Path, help="a folder to keep; its contents are reused")
    for name, parameter in list(inspect.signature(measure).parameters.items())[1:]:
        _add_option(parser, name, parameter.default)
    options = vars(parser.parse_args())
    as_json, page, work = (options.pop(name) for name in ("json", "page", "work"))
    rows: list[Row] = []
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for row in measure(folder, **options):
            if not as_json:
                print("\n".join(_lines(row, rows)), flush=True)
            rows.append(row)
    if page:
        _write_page(str(parser.description), rows, busy)
    if as_json:
        print(json.dumps(rows, indent=1))
    sys.exit(not all(row.get("held", True) for row in rows))


def _add_option(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    option = f"--{name.replace('_', '-')}"
    if isinstance(default, tuple):
        parser.add_argument(
            name if name in ("presets", "names") else option, nargs="*", type=type(default[0]), default=default
        )
    elif isinstance(default, bool):
        parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
    else:
        parser.add_argument(option, type=Path if default is None else type(default), default=default)


def _lines(row: Row, before: list[Row]) -> list[str]:
    """A row of a Markdown table; a new table begins if the columns change."""
    begins = not before or before[-1].keys() != row.keys()
    head = ["", f"| {' | '.join(row)} |", f"|{'---|' * len(row)}"] if begins else []
    return [*head, f"| {' | '.join(map(_cell, row.values()))} |"]


def _write_page(description: str, rows: list[Row], busy: float) -> None:
    """--page writes the rows with the command, the date, the machine and the versions. They replace the section in
    docs/results that is marked with this command; if there is none, they become the page docs/results/NAME.md.
    """
    name, options = Path(sys.argv[0]).stem, [one for one in sys.argv[1:] if one not in ("--page", "--json")]
    if "--work" in options:
        at = options.index("--work")
        del options[at : at + 2]
    typed = shlex.join(["python", "-m", f"tests.benchmarks.{name}", *options])
    measured = [f"`{typed}`, {time.strftime('%d %B %Y')}. {_machine(busy)}"]
    measured += [line for index, row in enumerate(rows) for line in _lines(row, rows[:index])]
    for page in RESULTS.glob("*.md"):
        text, mark = page.read_text(encoding="utf-8"), f"<!-- {typed} -->\n"
        before, marked, after = text.partition(mark)
        if marked:
            section = "\n".join(["", *measured, "", ""])
            page.write_text(before + mark + section + after[after.index(END) :], encoding="utf-8")
            return
    title, *text_below = description.strip().splitlines()
    page = RESULTS / f"{name}.md"
    page.write_text("\n".join([f"# {title}", *text_below, "", *measured, ""]), encoding="utf-8")


def _machine(busy: float) -> str:
    from perceiver_export.runtimes.machine import cpu_features, cpu_name

    versions = ", ".join(f"{one} {importlib.metadata.version(one)}" for one in _VERSIONS)
    features, python = ", ".join(cpu_features()), platform.python_version()
    cores = f"{os.cpu_count()} cores ({features}), load {busy:.1f} before the run"
    return f"{cpu_name()}, {cores}; Python {python}, {versions}."


def _cell(value: Any) -> str:
    if isinstance(value, dict) and value.keys() == {"value", "lower", "upper"}:
        return f"{_cell(value['value'])} ({_cell(value['lower'])} to {_cell(value['upper'])})"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def fresh(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module's function in a separate process; arguments and answer travel as JSON."""
    module = sys.modules[function.__module__].__spec__
    assert module is not None
    done = subprocess.run(
        [sys.executable, "-c", _CALL],
        input=json.dumps([module.name, function.__qualname__, arguments], default=str),
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    if done.returncode:
        raise SystemExit(f"{module.name}.{function.__qualname__}{arguments}:\n{done.stderr[-2000:]}")
    answer: T = json.loads(done.stdout.splitlines()[-1])
    return answer


def in_turn(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Each side's answers; all sides are called once per round."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            found[name].append(call())
    return found


def seconds_in_turn(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The times of each side, after one warm-up round."""
    in_turn(sides, 1)
    return in_turn({name: partial(seconds, call) for name, call in sides.items()}, rounds)


def medians(found: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The median of each list of numbers, or of each number in a list of rows."""
    return {
        name: {key: float(np.median([one[key] for one in values])) for key in values[0]}
        if isinstance(values[0], dict)
        else float(np.median(values))
        for name, values in found.items()
    }


def seconds(call: Callable[[], object]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
