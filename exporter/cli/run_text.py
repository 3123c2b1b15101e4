# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export run` on bundles that read text.

An input is the text itself, a ``.txt`` file, or ``-`` for standard input. To fill masks a file is one text, without
its last line break; to classify, each line is one, and blank lines are passed over.
"""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from perceiver_export.exporter.cli.answers import ranked, title
from perceiver_export.exporter.cli.files import check_file, write_json
from perceiver_export.exporter.cli.files import text as path_text
from perceiver_export.exporter.cli.output import print_json, print_table, progress_bar
from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.runtimes.errors import InputError

if TYPE_CHECKING:
    from perceiver_export.runtimes.tasks.fill_mask import Candidate, Filled, FillMask
    from perceiver_export.runtimes.tasks.text_classification import Answer, TextClassification


@dataclass(frozen=True)
class _Text:
    content: bytes
    source: str | None = None  # file, or file and line; None where the argument is the text

    def __str__(self) -> str:
        return self.content.decode(errors="replace")


def run_fill_mask(bundle: str, inputs: list[str], output: Path | None, options: RunOptions) -> None:
    """Print each text with its masks filled, and the candidates for each masked byte."""
    texts = _texts(inputs, by_line=False)
    if output is not None:
        check_file(output)
    answers: list[Filled] = []
    with (
        cast("FillMask", options.open_task(bundle)) as task,
        progress_bar("run", quiet=options.json) as progress,
    ):
        for done, text in enumerate(texts):
            progress("run", done, len(texts))
            with _located(text.source):
                answers.append(task(text.content, options.top))
        where = task.part("encoder" if task.split else None).describe()
    documents = [
        {"source": text.source, "input": str(text), "text": filled.text, "blanks": filled.blanks}
        for text, filled in zip(texts, answers, strict=True)
    ]
    if _documented({"runtime": where, "answers": documents}, output, options):
        return
    for filled in answers:
        typer.echo(_printable(filled.text))
        rows = [(str(blank.position), *map(_candidate, blank.candidates)) for blank in filled.blanks]
        print_table(title(bundle, where), ["position>", *_ranks(rows)], rows)


def run_classification(bundle: str, inputs: list[str], output: Path | None, options: RunOptions) -> None:
    """Print the most probable labels of each text, or the scores of each task."""
    from perceiver_export.runtimes.tasks.graphs import limits

    texts = _texts(inputs, by_line=True)
    if output is not None:
        check_file(output)
    answers: list[Answer] = []
    with (
        cast("TextClassification", options.open_task(bundle)) as task,
        progress_bar("run", quiet=options.json) as progress,
    ):
        for text in texts:
            with _located(text.source):
                task.tokenizer.encode(text.content)
        _, batch = limits(task.runtime.inputs[0], 0)
        for start in range(0, len(texts), batch):
            progress("run", start, len(texts))
            answers += task.batch([text.content for text in texts[start : start + batch]], options.top)
        where, tasks = task.runtime.describe(), task.tasks
    documents = [_classified(text, answer) for text, answer in zip(texts, answers, strict=True)]
    if _documented({"runtime": where, "answers": documents}, output, options):
        return
    rows = [(_shortened(str(text)), *_cells(answer)) for text, answer in zip(texts, answers, strict=True)]
    print_table(title(bundle, where), ["text", *(tasks or _ranks(rows))], rows)


def _texts(inputs: list[str], by_line: bool) -> list[_Text]:
    from perceiver_export.runtimes.byte_tokenizer import utf8

    texts: list[_Text] = []
    for argument in inputs:
        content = _file_content(argument)
        if content is None:
            texts.append(_Text(utf8(argument)))
            continue
        source = path_text(argument)
        with _located(source):
            content = utf8(content).removeprefix(codecs.BOM_UTF8)
        if by_line:
            lines = enumerate(content.splitlines(), 1)
            found = [_Text(line, f"{source}:{number}") for number, line in lines if line.strip()]
        else:
            found = [_Text(content.removesuffix(b"\n").removesuffix(b"\r"), source)]
        if not any(text.content for text in found):
            raise InputError(
                f"{_place(source)} holds no text", "write one text a line" if by_line else "write a text into it"
            )
        texts += found
    return texts


def _file_content(argument: str) -> bytes | None:
    """What a ``.txt`` file or standard input holds; None where the argument is the text itself."""
    if argument == "-":
        return sys.stdin.buffer.read()
    if not argument.lower().endswith(".txt"):
        return None
    try:
        return Path(argument).read_bytes()
    except OSError as error:
        raise InputError(
            f"{path_text(argument)} cannot be read: {error.strerror}",
            "check the path; where it is meant as text, pipe it in: echo TEXT | perceiver-export run BUNDLE -",
        ) from error


@contextlib.contextmanager
def _located(source: str | None) -> Iterator[None]:
    """Say in an InputError which file, and line, it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{_place(source)}: {error.message}" if source else error.message, error.hint) from error


def _place(source: str) -> str:
    """A file, or file and line, as people call it."""
    return f"standard input{source[1:]}" if source == "-" or source.startswith("-:") else source


def _documented(document: Any, output: Path | None, options: RunOptions) -> bool:
    """Write the document, and print it where JSON is wanted; whether it is."""
    if output is not None:
        write_json(output, document)
    if options.json:
        print_json(document)
    return options.json


def _classified(text: _Text, answer: Answer) -> dict[str, Any]:
    found = {"source": text.source, "input": str(text)}
    if isinstance(answer, dict):
        return {**found, "scores": {name: scores.tolist() for name, scores in answer.items()}}
    return {**found, "labels": answer}


def _cells(answer: Answer) -> list[str]:
    if isinstance(answer, dict):
        return ["  ".join(f"{score:.3g}" for score in scores) for scores in answer.values()]
    return ranked(answer)


def _candidate(candidate: Candidate) -> str:
    return f"{'␣' if candidate.symbol == ' ' else candidate.symbol}  {candidate.probability:.1%}"


def _ranks(rows: list[tuple[str, ...]]) -> list[str]:
    return [f"{rank}." for rank in range(1, len(rows[0]))]


def _shortened(text: str) -> str:
    return _printable(text if len(text) <= 60 else f"{text[:59]}…")


def _printable(text: str) -> str:
    """A model's bytes may be control sequences; the terminal does not get them."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)
