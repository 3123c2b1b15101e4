# SPDX-License-Identifier: Apache-2.0
"""`run` with text: fill masks, or classify.

An input is a file, ``-`` for standard input, or the text itself; ``--text`` is always a text. In a ``.jsonl`` file each
line has a ``text``. A ``.txt`` file to fill is one text, without its last line break. In one to classify, each line is
a text, and blank lines are skipped.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_export.exporter.cli.answers import Answers, Progress, Request, described, label_table
from perceiver_export.exporter.cli.output import Table
from perceiver_export.runtimes.errors import InputError, printable
from perceiver_export.runtimes.files import readable, reading

if TYPE_CHECKING:
    from perceiver_export.runtimes.tasks.text import Candidate

_FILES = (".txt", ".jsonl")


@dataclass(frozen=True)
class _Text:
    """``source``: the file, or file and line; None for a text on the command line."""

    content: bytes
    source: str | None = None

    def document(self, **found: Any) -> dict[str, Any]:
        """The text for JSON, with its answer ``found``."""
        return {"source": self.source, "input": self.content.decode(errors="replace"), **found}


def answer_masks(task: Any, texts: Sequence[_Text], request: Request, progress: Progress) -> Answers:
    """Each text with its masks filled, and the candidates for each masked byte."""
    documents: list[dict[str, Any]] = []
    shown: list[Table | str] = [_origins(texts)]
    for done, text in enumerate(texts):
        progress("run", done, len(texts))
        with _located(text.source):
            filled = task(text.content, request.top)
        documents.append(text.document(text=filled.text, blanks=filled.blanks))
        rows = [(str(blank.position), *map(_candidate, blank.candidates)) for blank in filled.blanks]
        ranks = [f"{rank}." for rank in range(1, len(rows[0]))]
        shown += [filled.text, Table("", ["position>", *ranks], rows)]
    return Answers(task.part("encoder" if task.split else None), {"answers": documents}, shown)


def answer_texts(task: Any, texts: Sequence[_Text], request: Request, progress: Progress) -> Answers:
    """The most probable labels of each text, its values, or the scores of each task."""
    for text in texts:
        with _located(text.source):
            task.tokenizer.encode(text.content)
    answers: list[Any] = []
    _, batch = task.runtime.inputs[0].limits(0)
    for start in range(0, len(texts), batch):
        progress("run", start, len(texts))
        answers += task.batch([text.content for text in texts[start : start + batch]], request.top)
    names = [_shortened(text.content.decode(errors="replace")) for text in texts]
    if task.tasks:
        found = [{"scores": {name: one.tolist() for name, one in scores.items()}} for scores in answers]
        rows = [
            (name, *("  ".join(f"{score:.3g}" for score in one) for one in scores.values()))
            for name, scores in zip(names, answers, strict=True)
        ]
        table = Table("", ["text", *task.tasks], rows)
    else:
        found = [described(one)[0] for one in answers]
        table = label_table("text", names, answers, task.kind)
    documents = [text.document(**one) for text, one in zip(texts, found, strict=True)]
    return Answers(task.runtime, {"answers": documents}, [_origins(texts), table])


def read_texts(request: Request, by_line: bool) -> list[_Text]:
    """The texts of a request. A .txt file is one text, or with ``by_line`` one text per line."""
    from perceiver_export.runtimes.tasks.tokenizers import utf8

    texts = [_Text(utf8(text)) for text in request.text]
    for argument in request.inputs:
        content = _file_content(argument)
        if content is None:
            texts.append(_Text(utf8(argument)))
            continue
        source = readable(argument)
        with _located(source):
            content = utf8(content).removeprefix(codecs.BOM_UTF8)
        if argument.lower().endswith(".jsonl"):
            found = list(_json_lines(content, source))
        elif by_line:
            lines = enumerate(content.splitlines(), 1)
            found = [_Text(line, f"{source}:{number}") for number, line in lines if line.strip()]
        else:
            found = [_Text(content.removesuffix(b"\n").removesuffix(b"\r"), source)]
        if not any(text.content for text in found):
            hint = "write one text per line" if by_line else "write a text into it"
            raise InputError(f"{_place(source)} holds no text", hint)
        texts += found
    return texts


def _json_lines(content: bytes, source: str) -> Iterator[_Text]:
    """The ``text`` of each line that is not blank."""
    import msgspec

    class Line(msgspec.Struct):
        text: str

    for number, line in enumerate(content.split(b"\n"), 1):
        place = f"{source}:{number}"
        try:
            if line.strip():
                yield _Text(msgspec.json.decode(line, type=Line).text.encode(), place)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InputError(f"{place}: {error}", 'write {"text": "…"} on each line') from error


def _file_content(argument: str) -> bytes | None:
    """The content of a file or of standard input; None for an argument that is the text itself."""
    if argument == "-":
        return sys.stdin.buffer.read()
    name = readable(argument)
    if not argument.lower().endswith(_FILES):
        if not os.path.lexists(argument):
            return None
        found = f"{name} exists but is not a text file: its name does not end in {' or '.join(_FILES)}"
        raise InputError(found, f"rename it; if you mean the name as text: --text {shlex.quote(name)}")
    with reading(name, InputError, f"check the path; if you mean it as text: --text {shlex.quote(_shortened(name))}"):
        return Path(argument).read_bytes()


def _origins(texts: Sequence[_Text]) -> str:
    """The origins of the texts: the command line, and files."""
    counts = collections.Counter(
        "the command line" if text.source is None else _place(re.sub(r":[0-9]+$", "", text.source)) for text in texts
    )
    return "texts: " + ", ".join(f"{count} from {source}" for source, count in counts.items())


@contextlib.contextmanager
def _located(source: str | None) -> Iterator[None]:
    """Name the file and line in an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{_place(source)}: {error.message}" if source else error.message, error.hint) from error


def _place(source: str) -> str:
    """A file, or file and line, in words."""
    return f"standard input{source[1:]}" if source == "-" or source.startswith("-:") else source


def _candidate(candidate: Candidate) -> str:
    return f"{'␣' if candidate.symbol == ' ' else candidate.symbol}  {candidate.probability:.1%}"


def _shortened(text: str) -> str:
    return printable(text if len(text) <= 60 else f"{text[:59]}…")
