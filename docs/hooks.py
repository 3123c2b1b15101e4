# SPDX-License-Identifier: Apache-2.0
"""What the site generates: commands from their help, Python names from their docstrings, errors, and llms.txt.

A page marks the place with `<!-- commands -->`, `<!-- errors -->`, `<!-- examples -->`,
`<!-- names: PACKAGE -->` or `<!-- structs: MODULE -->`.
llms.txt lists the pages for language models, which read them as Markdown: the site has PAGE.md beside PAGE/.
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

import msgspec
import typer.main

from perceiver_export.exporter.cli.main import app
from perceiver_export.runtimes import errors

_OBJECT = re.compile(r"^::: (\S+)\n(?:    options: .*\n)?", re.MULTILINE)
_pages: dict[str, str] = {}  # the Markdown of each page, by its path


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for each page."""
    markdown = markdown.replace("<!-- commands -->", "\n".join(_commands()))
    markdown = markdown.replace("<!-- errors -->", "\n".join(_errors()))
    markdown = markdown.replace("<!-- examples -->", "\n".join(_examples()))
    markdown = re.sub(r"<!-- names: (\S+) -->", lambda found: "\n".join(_names(found[1])), markdown)
    markdown = re.sub(r"<!-- structs: (\S+) -->", lambda found: "\n".join(_structs(found[1])), markdown)
    _pages[page.file.src_path] = markdown
    return markdown


def on_post_build(config: Any) -> None:
    """Called by MkDocs at the end: llms.txt, and each page as Markdown."""
    site = Path(config.site_dir)
    for path, markdown in _pages.items():
        (site / path).write_text(_OBJECT.sub(lambda found: _described(found[1]), markdown), encoding="utf-8")
    (site / "llms.txt").write_text("\n".join(_index(config)), encoding="utf-8")


def _index(config: Any) -> Iterator[str]:
    """By llmstxt.org: the title, what it is, and the pages by section, each with its first sentence."""
    yield f"# {config.site_name}\n\n> {config.site_description}\n"
    for section in config.nav:
        ((title, entries),) = section.items()
        yield f"## {title}\n"
        for entry in entries if isinstance(entries, list) else [section]:
            ((name, path),) = entry.items()
            yield f"- [{name}]({path}): {_first_sentence(_pages[path])}"
        yield ""


def _first_sentence(markdown: str) -> str:
    """Of the first paragraph below the title."""
    text = next(text for text in markdown.split("\n\n")[1:] if re.match(r"\w|`\w", text))
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.split(r"(?<=\.) ", " ".join(text.split()))[0])


def _described(path: str) -> str:
    """A Python name as Markdown, where mkdocstrings does not run."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not callable(found):
        return f"### {name}\n"
    return f"### {name}\n\n```python\n{name}{inspect.signature(found)}\n```\n\n{inspect.getdoc(found)}\n"


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


def _structs(name: str) -> Iterator[str]:
    """Every struct of a module that describes a file."""
    for struct in vars(importlib.import_module(name)).values():
        public = inspect.isclass(struct) and struct.__module__ == name and not struct.__name__.startswith("_")
        if public and issubclass(struct, msgspec.Struct):
            yield f"::: {name}.{struct.__name__}\n    options: {{show_if_no_docstring: true}}\n"


def _errors() -> Iterator[str]:
    yield "| error | is a | what it says |\n|---|---|---|"
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
    """A picture or a sound inside the page; of a link to another file of the example its text."""
    kind = mimetypes.guess_type(link[2])[0] or ""
    if not kind.startswith(("image/", "audio/")):
        return link[0].replace("../../docs/", "") if link[2].startswith(("https:", "../../docs/")) else link[1]
    data = f"data:{kind};base64,{base64.b64encode((folder / link[2]).read_bytes()).decode()}"
    return f"![{link[1]}]({data})" if kind.startswith("image/") else f'<audio controls src="{data}"></audio>'
