# SPDX-License-Identifier: Apache-2.0
"""What commands print: tables that are too wide, sizes, stages that cost nothing."""

from __future__ import annotations

import pytest

from perceiver_export.exporter.cli.output import mebibytes, print_table


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


def test_small_sizes_are_not_rounded_to_nothing() -> None:
    assert [mebibytes(size) for size in (0, 1536, 2**20, 5e9)] == ["0.0 MiB", "1.5 KiB", "1.0 MiB", "4,768.4 MiB"]
