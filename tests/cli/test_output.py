# SPDX-License-Identifier: Apache-2.0
"""What commands print: tables that are too wide, sizes, stages that cost nothing."""

from __future__ import annotations

import re
import shlex

import pytest

from perceiver_export.exporter.cli.output import mebibytes, print_table, quiet, say


def test_names_are_folded_between_their_parts_and_figures_never(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    rows = [
        ("encoder.self_attentions.0.mlp", "298.75 k", "42.00 MFLOP"),
        ("/a/folder/of/pictures.png", "1 k", "0 FLOP"),
    ]
    print_table("title", ["", "weights>", "bytes read and written>"], rows)
    lines = capsys.readouterr().out.splitlines()
    rule = next(number for number, line in enumerate(lines) if "──" in line)
    first, *_, last = cells = [re.split(" {2,}", line) for line in lines[rule + 1 :]]

    assert max(map(len, lines)) <= 50
    assert [first[1:], last[1:]] == [["298.75 k", "42.00 MFLOP"], ["1 k", "0 FLOP"]]
    assert [name for name, *_ in cells] == ["encoder.self_attentions.0.", "mlp", "/a/folder/of/pictures.png"]
    monkeypatch.setenv("COLUMNS", "2")  # no terminal is so narrow
    print_table("title", ["[red]"], [("a",)])
    assert "[red]" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "30")  # too few for the figures of a row: it is a paragraph
    print_table("title", ["", "weights>", "bytes read and written>"], rows)
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}; weights {weights}; bytes read and written {moved}" in said for name, weights, moved in rows)


def test_a_command_goes_on_after_a_backslash_and_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["perceiver-export", "validate", "D" * 40, "--data", "a b " * 10, "--against", "E" * 40]
    for text, mark in ((shlex.join(words), "next:"), (f"build it: {shlex.join(words)}", "")):
        say(text, mark)
        *_, copied = capsys.readouterr().out.partition("perceiver-export")

        assert " \\\n" in copied
        assert shlex.split("perceiver-export" + copied.replace("\\\n", "")) == words  # as a shell reads it


def test_quiet_leaves_verdicts_and_warnings_of_a_command_that_writes(capsys: pytest.CaptureFixture[str]) -> None:
    kept, left_out = ("PASS, with reservations:", "NO GATE:", "warning:"), ("", "PASS", "  rung 1:", "certificate")
    with quiet(True, True):
        for mark in (*kept, *left_out):
            say("text", mark)

    assert capsys.readouterr().out.splitlines() == [f"{mark} text" for mark in kept]


def test_small_sizes_are_not_rounded_to_nothing() -> None:
    assert [mebibytes(size) for size in (0, 1536, 2**20, 5e9)] == ["0.0 MiB", "1.5 KiB", "1.0 MiB", "4,768.4 MiB"]
