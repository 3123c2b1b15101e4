# SPDX-License-Identifier: Apache-2.0
"""Writes the generated parts of the pages: commands, Python names, the structs of a bundle, errors; the gallery.

A part stands between a mark and `<!-- end -->`. The marks are

    <!-- commands -->                      every command, from its help
    <!-- errors -->                        a table of the errors
    <!-- targets -->                       a table of the targets
    <!-- structs: MODULE -->               the structs of a module that describes a file
    <!-- names: PACKAGE -->                the public names of a package
    <!-- names: MODULE NAME … -->          these names of a module
    <!-- index: PAGE PACKAGE -->           a table of the public names, with links to PAGE
    <!-- gallery -->                       the trained examples, from their READMEs

`make reference` runs this file; a test compares the pages with what it would write.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_overloads

import msgspec
import typer
import typer.main

from perceiver_export.exporter.cli.main import app
from perceiver_export.runtimes import errors
from perceiver_export.runtimes.engines.backend import TARGETS

DOCS = Path(__file__).resolve().parent
_MARK = r"^(<!-- (commands|errors|targets|structs|names|index|gallery)(?:: ([^\n]*))? -->\n)"
_PART = re.compile(_MARK + r"(?:(?!^<!-- ).)*(?=^<!-- end -->)", re.M | re.S)
_WIDTH = 80


def pages() -> dict[Path, str]:
    """The text of each page that has generated parts."""
    files = [DOCS / "gallery.md", *DOCS.glob("reference/*.md")]
    texts = {page: page.read_text(encoding="utf-8") for page in files}
    for page, text in texts.items():
        if len(re.findall(_MARK, text, re.M)) != len(_PART.findall(text)):
            raise SystemExit(f"{page}: a generated part has no <!-- end -->")
    return {page: _PART.sub(_filled, text) for page, text in texts.items() if _PART.search(text)}


def _filled(found: re.Match[str]) -> str:
    mark, kind, subject = found.groups()
    parts: dict[str, Callable[..., Iterable[str]]] = {
        "commands": _commands,
        "errors": _errors,
        "targets": _targets,
        "structs": _structs,
        "names": _names,
        "index": _index,
        "gallery": _gallery,
    }
    return "\n".join([mark, *parts[kind](*(subject or "").split()), ""])


def _gallery() -> Iterator[str]:
    """Of each example's README what comes before its first command or heading, with links from docs/."""
    for file in sorted(DOCS.parent.glob("examples/*/demo.json")):
        name = file.parent.name
        shown = re.split(r"```sh|\n## ", (file.parent / "README.md").read_text(encoding="utf-8"))[0]
        shown = re.sub(r"\]\((?!https:|\.\./)", f"](../examples/{name}/", shown)
        yield "#" + shown.replace("](../../docs/", "](")
        yield f"```sh\nperceiver-export demo {name}\n```\n"


def _commands() -> Iterator[str]:
    group: Any = typer.main.get_command(app)
    context = typer.Context(group)
    groups: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        groups.setdefault(command.rich_help_panel, []).append(f"[{name}](#{name})")
    yield "| to | commands |\n|---|---|"
    yield from (f"| {title} | {' · '.join(names)} |" for title, names in groups.items())
    yield "\n| Options of the program | |\n|---|---|"
    yield from (f"| {_flags(one)} | {_help(one)} |" for one in group.get_params(context) if one.name != "help")
    yield ""
    for name, command in group.commands.items():
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        yield f"## {name}\n\n```text\nperceiver-export {usage}\n```\n"
        yield inspect.cleandoc(command.help or "") + "\n"
        panels: dict[str, list[Any]] = {}
        for one in command.get_params(context):
            if one.name != "help":
                panels.setdefault(one.rich_help_panel or f"{one.param_type_name.title()}s", []).append(one)
        for panel, parameters in panels.items():
            yield f"| {panel} | |\n|---|---|"
            yield from (f"| {_flags(one)} | {_help(one)} |" for one in parameters)
            yield ""


def _flags(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _literal(f"{parameter.metavar}{'...' * (parameter.nargs == -1)}")
    long, *short = sorted(parameter.opts, key=len, reverse=True)
    value = f" {parameter.metavar}".rstrip()
    return ", ".join(map(_literal, (f"{long}{value}", *short, *parameter.secondary_opts)))


def _help(parameter: Any) -> str:
    default = parameter.default
    if parameter.required and parameter.param_type_name == "option":
        return f"{_cell(parameter.help)} Required."
    if default is None or default is False or default == ():
        return _cell(parameter.help)
    shown = max(parameter.opts, key=len) if default is True else default
    return f"{_cell(parameter.help)} Default: `{shown}`."


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "&#124;")


def _literal(text: str) -> str:
    """Code in a cell, where only the entity of a bar is read alike by the site and in the repository."""
    return f"<code>{_cell(html.escape(text))}</code>" if "|" in text else f"`{text}`"


def _errors() -> Iterator[str]:
    yield "| error | is a | meaning |\n|---|---|---|"
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, Exception):
            yield f"| `{name}` | `{error.__base__.__name__ if error.__base__ else ''}` | {_cell(error.__doc__)} |"
    yield ""


def _targets() -> Iterator[str]:
    yield "| target | runs on | library, one of | extra | compiled |\n|---|---|---|---|---|"
    for one in TARGETS.values():
        libraries, when = ", ".join(map(_literal, one.distributions)), "" if one.needs_engine else "at load, or "
        yield f"| `{one.name}` | {one.hardware} | {libraries} | `{one.extra}` | {when}by `build` |"
    yield "| `ort-NAME` | the execution provider NAME of ONNX Runtime | one that has it | | at load, or by `build` |\n"


def _structs(name: str) -> Iterator[str]:
    """Every public struct of a module that describes a file."""
    for struct in vars(importlib.import_module(name)).values():
        public = inspect.isclass(struct) and struct.__module__ == name and not struct.__name__.startswith("_")
        if public and issubclass(struct, msgspec.Struct):
            yield from _described(struct.__name__, struct)


def _index(page: str, package: str) -> Iterator[str]:
    module = importlib.import_module(package)
    yield "| name | |\n|---|---|"
    for name in module.__all__:
        found = getattr(module, name)
        if _is_documented(found):
            first = re.split(r"(?<=\.)\s|\n\n", inspect.getdoc(found) or "")[0]
            yield f"| [`{name}`]({page}#{name.lower()}) | {_cell(first)} |"
    yield ""


def _is_documented(found: Any) -> bool:
    """Errors are described on their page, and constants with what uses them."""
    return callable(found) and not (isinstance(found, type) and issubclass(found, Exception))


def _names(package: str, *names: str) -> Iterator[str]:
    module = importlib.import_module(package)
    for name in names or module.__all__:
        found = getattr(module, name)
        if not (inspect.isclass(found) or inspect.isfunction(found)) and names:
            yield from _alias(name, module)
        elif _is_documented(found):
            yield from _described(name, found)


def _alias(name: str, module: Any) -> Iterator[str]:
    """A section of a named type: its definition, and the comment before or behind it."""
    source = inspect.getsource(module)
    lines, nodes = source.splitlines(), {}
    for one in ast.parse(source).body:
        if isinstance(one, (ast.Assign, ast.AnnAssign)):
            nodes[ast.unparse(one.targets[0] if isinstance(one, ast.Assign) else one.target)] = one
    node = nodes[name]
    assert node.value is not None
    value = str(node.value.value) if isinstance(node.value, ast.Constant) else ast.unparse(node.value)
    above = itertools.takewhile(lambda line: line.startswith("# "), lines[node.lineno - 2 :: -1])
    comment = lines[node.lineno - 1].partition("  # ")[2] or " ".join(line[2:] for line in [*above][::-1])
    yield f"### {name}\n\n{_code([f'{name} = {value}'])}"
    if comment:
        yield textwrap.fill(f"{comment[:1].upper()}{comment[1:].rstrip('.')}.", 120) + "\n"


def _described(name: str, found: Any) -> Iterator[str]:
    """A section: the declaration, the docstring, and of a class its documented fields, properties and methods."""
    node = _declared(found)
    if isinstance(node, ast.FunctionDef):
        forms = [one for one in map(_declared, get_overloads(found)) if isinstance(one, ast.FunctionDef)] or [node]
        lines = [line for form in forms for line in _signature(form, found)]
        yield f"### {name}\n\n{_code(lines)}\n{_text(found)}"
        return
    assert isinstance(node, ast.ClassDef)
    bases = ", ".join(base.__name__ for base in found.__bases__ if base.__module__.startswith("perceiver_export"))
    title = f"class {name}({bases})" if bases else f"class {name}"
    fields = _fields(node, found)
    yield f"### {name}\n\n{_code([f'{title}:' if fields else title, *fields])}\n{_text(found)}"
    if issubclass(found, msgspec.Struct) and found.__struct_config__.tag:
        yield f"`type` in the file: `{found.__struct_config__.tag}`\n"
    documented = [one for one in _dataclass_fields(found) if "doc" in one.metadata]
    yield from _table("field", ((one.name, one.metadata["doc"]) for one in documented))
    inherited = {one for base in found.__mro__[1:] for one in vars(base)} - {"__call__", "__init__"}
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name not in inherited]
    methods = [one for one in methods if one.name == "__call__" or (_is_public(one) and ast.get_docstring(one))]
    properties = [one for one in methods if "property" in _decorators(one)]
    yield from _table("property", ((_typed(one), ast.get_docstring(one) or "") for one in properties))
    for method in methods:
        if method not in properties:
            yield f"{_code(_signature(method, found))}\n{ast.get_docstring(method) or ''}\n"


def _declared(found: Any) -> ast.stmt:
    return ast.parse(textwrap.dedent(inspect.getsource(found))).body[0]


def _dataclass_fields(found: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()


def _is_public(method: ast.FunctionDef) -> bool:
    return method.name == "__init__" or not method.name.startswith("_")


def _decorators(method: ast.FunctionDef) -> list[str]:
    return [ast.unparse(one) for one in method.decorator_list]


def _typed(method: ast.FunctionDef) -> str:
    return f"{method.name}: {ast.unparse(method.returns)}" if method.returns else method.name


def _text(found: Any) -> str:
    return f"{inspect.getdoc(found)}\n" if found.__doc__ else ""


def _table(header: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    lines = [f"| {_literal(name)} | {_cell(text)} |" for name, text in rows]
    if lines:
        yield "\n".join([f"| {header} | |", "|---|---|", *lines, ""])


def _fields(node: ast.ClassDef, found: Any) -> list[str]:
    """The lines of a class's fields, with their comments; without fields, of what its __init__ makes public."""
    lines = textwrap.dedent(inspect.getsource(found)).splitlines()
    shown = list[str]()
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and not ast.unparse(one.target).startswith("_"):
            value = "" if one.value is None else f" = {_default(one.value)}"
            field = f"    {ast.unparse(one.target)}: {ast.unparse(one.annotation)}{value}"
            comment = "".join(lines[(one.end_lineno or one.lineno) - 1].partition("  # ")[1:])
            fits = len(field + comment) <= _WIDTH
            shown += [field + comment] if fits else [f"    {comment.strip()}", field]
    made = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    return shown or (list(_attributes(made)) if made else [])


def _attributes(made: ast.FunctionDef) -> Iterator[str]:
    """Public attributes that an __init__ sets to its parameters."""
    given = {one.arg: one.annotation for one in (*made.args.args, *made.args.kwonlyargs)}
    for one in made.body:
        if isinstance(one, ast.Assign):
            name, annotation = ast.unparse(one.targets[0]), given.get(ast.unparse(one.value))
            if annotation and re.match(r"self\.[a-z]", name):
                yield f"    {name.removeprefix('self.')}: {ast.unparse(annotation)}"


def _default(value: ast.expr) -> str:
    """The default in `option(default, doc)` or `field(default_factory=…)`, or the value itself."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("option", "field"):
        keywords = {one.arg: one.value for one in value.keywords}
        value = value.args[0] if value.args else keywords.get("default") or keywords["default_factory"]
    shown = ast.unparse(value)
    return {"dict": "{}", "tuple": "()", "list": "[]"}.get(shown, shown)


def _signature(node: ast.FunctionDef, found: Any) -> list[str]:
    """A function's or a method's declaration; where it is longer than a line, each parameter has one."""
    owner = found.__name__ if inspect.isclass(found) else ""
    given = _parameters(node.args, inspect.getmodule(found))
    if owner and "staticmethod" not in _decorators(node):
        given = given[1:]
    name = owner if node.name == "__init__" else ".".join(filter(None, (owner, node.name)))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = f"{name}({', '.join(given)}){returns}"
    return [line] if len(line) <= _WIDTH else [f"{name}(", *(f"    {one}," for one in given), f"){returns}"]


def _parameters(given: ast.arguments, module: Any) -> list[str]:
    def shown(one: ast.arg, default: ast.expr | None = None) -> str:
        annotated = f"{one.arg}: {ast.unparse(one.annotation)}" if one.annotation else one.arg
        return annotated if default is None else f"{annotated} = {_constant(default, module)}"

    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    result = [shown(one, default) for one, default in zip(positional, defaults, strict=True)]
    if given.vararg:
        result.append(f"*{shown(given.vararg)}")
    elif given.kwonlyargs:
        result.append("*")
    result += [shown(one, default) for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [*result, *([f"**{shown(given.kwarg)}"] if given.kwarg else [])]


def _constant(default: ast.expr, module: Any) -> str:
    """A default as in the source; of a module's constant, which is not public, its value."""
    if isinstance(default, ast.Name):
        for one in ast.parse(inspect.getsource(module)).body:
            if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == default.id:
                return ast.unparse(one.value)
    return "..." if isinstance(default, ast.Lambda) else ast.unparse(default)


def _code(lines: list[str]) -> str:
    quoted = (re.sub("^[^#]*", lambda found: found[0].replace("'", '"'), line) for line in lines)
    return "\n".join(["```py", *quoted, "```", ""])


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
