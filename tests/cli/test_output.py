# SPDX-License-Identifier: Apache-2.0
"""What commands print: tables that are too wide, sizes, stages that cost nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from perceiver_export.exporter.budget import budget_text
from perceiver_export.exporter.cli.output import mebibytes, print_table
from tests.cli.commands import succeed


@pytest.mark.parametrize("length", [10, 60], ids=["fits", "too wide"])
def test_a_table_that_turns_has_a_row_a_column_where_there_is_no_room(
    capsys: pytest.CaptureFixture[str], length: int
) -> None:
    """A pipe has 160 columns: three of 60 do not fit, two do; and no cell is broken."""
    a, b, c, d, e, f = (letter * length for letter in "abcdef")
    print_table("title", ["", "left", "middle", "right>"], [("first", a, b, c), ("second", d, e, f)], turns=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]

    wide, turned = [["first", a, b, c], ["second", d, e, f]], [["left", a, d], ["middle", b, e], ["right", c, f]]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert cells == (wide if length == 10 else turned)


def test_names_are_folded_between_their_parts_and_figures_never(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "56")
    rows = [
        ("encoder.self_attentions.0.mlp", "298.75 k", "42.00 MFLOP"),
        ("/a/folder/of/pictures.png", "1 k", "0 FLOP"),
    ]
    print_table("title", ["", "weights>", "bytes read and written>"], rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]

    assert max(map(len, lines)) <= 56
    assert {cell for _, *figures in cells for cell in figures} == {"298.75 k", "42.00 MFLOP", "1 k", "0 FLOP", ""}
    folded = "".join(name for name, *_ in cells)
    assert folded == "".join(name for name, *_ in rows)
    assert [name for name, *_ in cells] == ["encoder.self_attentions.0.", "mlp", "/a/folder/of/pictures.png"]


def test_sizes_of_memory_budgets_are_readable() -> None:
    sizes = {2**29: "512 MiB", 3 * 2**19: "1.5 MiB", 2**10: "1 KiB", 1000: "1000 bytes"}
    assert {size: budget_text(size) for size in sizes} == sizes


def test_small_sizes_are_not_rounded_to_nothing() -> None:
    assert [mebibytes(size) for size in (0, 1536, 2**20, 5e9)] == ["0.0 MiB", "1.5 KiB", "1.0 MiB", "4,768.4 MiB"]


def test_inspect_leaves_out_stages_that_cost_nothing(fashion_bundle: Path) -> None:
    printed = succeed("inspect", fashion_bundle)

    assert "encoder.cross_attentions" in printed
    assert "│      0 FLOP" not in printed
