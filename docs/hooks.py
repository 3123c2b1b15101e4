# SPDX-License-Identifier: Apache-2.0
"""Pages of the site that are generated: commands from their help, Python names from their docstrings.

A page marks the place with `<!-- commands -->`, `<!-- errors -->`, `<!-- examples -->` or `<!-- names: PACKAGE -->`.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import inspect
import mimetypes
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import typer.main

from perceiver_export.exporter.cli.main import app
from perceiver_export.runtimes import errors


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for each page."""
    markdown = markdown.replace("<!-- commands -->", "\n".join(_commands()))
    markdown = markdown.replace("<!-- errors -->", "\n".join(_errors()))
    markdown = markdown.replace("<!-- examples -->", "\n".join(_examples()))
    return re.sub(r"<!-- names: (\S+) -->", lambda found: "\n".join(_names(found[1])), markdown)


def _commands() -> Iterator[str]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        arguments = [_metavar(one) for one in command.params if one.param_type_name == "argument"]
        yield f"## {name}\n\n```text\nperceiver-export {' '.join([name, *arguments])} [OPTIONS]\n```\n"
        yield inspect.cleandoc(command.help or "") + "\n"
        yield "| | |\n|---|---|"
        for parameter in command.params:
            yield f"| {_flags(parameter)} | {_cell(getattr(parameter, 'help', ''))} |"
        yield ""


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper()) + ("…" if parameter.nargs == -1 else "")


def _flags(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_metavar(parameter)}`"
    kind = parameter.type_descriptor.annotation.__name__.upper()
    value = "" if parameter.is_flag else f" {parameter.metavar or kind}"
    return ", ".join(f"`{flag}{value}`" for flag in (*parameter.opts, *parameter.secondary_opts))


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _names(package: str) -> Iterator[str]:
    module = importlib.import_module(package)
    for name in module.__all__:
        found = getattr(module, name)
        if name.endswith("Error"):
            continue  # errors have a section of their own
        yield f"::: {getattr(found, '__module__', package)}.{name}\n"
        fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
        if documented := [one for one in fields if "doc" in one.metadata]:
            yield "| field | |\n|---|---|"
            yield from (f"| `{one.name}` | {_cell(one.metadata['doc'])} |" for one in documented)
            yield ""


def _errors() -> Iterator[str]:
    yield "| error | is a | raised when |\n|---|---|---|"
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, Exception):
            yield f"| `{name}` | `{error.__base__.__name__ if error.__base__ else ''}` | {_cell(error.__doc__)} |"


def _examples() -> Iterator[str]:
    """Of each README what comes before its first command."""
    for file in sorted(Path(__file__).resolve().parents[1].glob("examples/*/demo.json")):
        shown = (file.parent / "README.md").read_text(encoding="utf-8").partition("```sh")[0]
        yield "#" + re.sub(r"!?\[([^]]*)\]\(([^)]+)\)", partial(_inline, file.parent), shown)
        yield f"```sh\nperceiver-export demo {file.parent.name}\n```\n"


def _inline(folder: Path, link: re.Match[str]) -> str:
    """A picture or a sound inside the page; another link as it is."""
    kind = mimetypes.guess_type(link[2])[0] or ""
    if not kind.startswith(("image/", "audio/")):
        return link[0]
    data = f"data:{kind};base64,{base64.b64encode((folder / link[2]).read_bytes()).decode()}"
    return f"![{link[1]}]({data})" if kind.startswith("image/") else f'<audio controls src="{data}"></audio>'
