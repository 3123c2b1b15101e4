# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export quantize --search DATA --certify DATA`: mixed precision that holds its gates, certified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from perceiver_export.exporter.cli.output import print_json, print_table, progress_bar


def search_and_show(bundle: str, output: str | Path, json: bool, **options: Any) -> None:
    """`calibration.mixed_precision`, then a row for each mixture that was tried."""
    from perceiver_export.calibration.mixed_precision import search

    with progress_bar("search", quiet=json) as progress:
        found = search(bundle, output, progress=progress, **options)
    if json:
        print_json(found)
        return
    rows = []
    for index, rung in enumerate(found.rungs):
        schemes = sorted(set(rung.precision.values()))
        names = ", ".join(list(rung.precision)[:2]) + (", …" if len(rung.precision) > 2 else "")
        what = f"{len(rung.precision)} in {', '.join(schemes)}: {names}" if rung.precision else "all in int8"
        outcomes = [_outcomes(said) for said in (rung.search, rung.certification)]
        rows.append((what, f"{rung.time:.2f} ×", *outcomes, "kept" if index == found.kept else ""))
    print_table("what was tried", ["layers", "time of fp32's>", "on the search split", "certification", ""], rows)
    for certificate in found.certificates:
        typer.echo(f"certified: {certificate}")
    typer.echo(f"written to {output}")


def _outcomes(said: tuple[str, ...]) -> str:
    return ", ".join(text.partition(":")[0] for text in said) or "not needed"
