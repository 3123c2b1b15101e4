# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export quantize --search DATA --certify DATA`: mixed precision that holds its gates, certified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from perceiver_export.exporter.cli.output import print_json, print_table, progress_bar

if TYPE_CHECKING:
    from perceiver_export.calibration.mixed_precision import Found
    from perceiver_export.calibration.trials import Rung


def search_and_show(bundle: str, output: str | Path, json: bool, sensitivity: Path | None, **options: Any) -> None:
    """`calibration.mixed_precision`, then a row for each mixture that was tried."""
    from perceiver_export.calibration import search
    from perceiver_export.calibration.sensitivity import write_sensitivity

    with progress_bar("search", quiet=json) as progress:
        found = search(bundle, output, progress=progress, **options)
    if sensitivity is not None:
        write_sensitivity(sensitivity, found.ranking)
    if json:
        print_json(found)
        return
    rows = [
        (str(rung.step), _what(rung), _times(rung), f"{rung.size:.2f} ×", *_outcomes(rung), kept)
        for rung, kept in ((rung, "kept" if index == found.kept else "") for index, rung in enumerate(found.rungs))
    ]
    columns = ["rung>", "layers that went back", "a call, of fp32's", "size, of fp32's>", "on the search split"]
    print_table(f"tried of {found.ladder} rungs", [*columns, "certification", ""], rows)
    _show_ranking(found)
    for certificate in found.certificates:
        typer.echo(f"certified: {certificate}")
    for warning in found.warnings:
        typer.echo(typer.style("warning:", fg="yellow", bold=True) + f" {warning}")
    typer.echo(f"written to {output}")


def _what(rung: Rung) -> str:
    if not rung.precision:
        return "none"
    counts = {scheme: list(rung.precision.values()).count(scheme) for scheme in sorted(set(rung.precision.values()))}
    names = ", ".join(list(rung.precision)[:2]) + (", …" if len(rung.precision) > 2 else "")
    return f"{', '.join(f'{count} to {scheme}' for scheme, count in counts.items())}: {names}"


def _times(rung: Rung) -> str:
    return ", ".join(f"{time.target} {time.milliseconds:.2f} ms, {time.ratio:.2f} ×" for time in rung.times)


def _outcomes(rung: Rung) -> tuple[str, str]:
    search, certification = (
        ", ".join(text.partition(":")[0] for text in said) for said in (rung.search, rung.certification)
    )
    return search, certification or "not needed"


def _show_ranking(found: Found) -> None:
    """The layers that cost most: it is they that go back first."""
    first = ", ".join(f"{one.group} ({one.output_sqnr:.1f} dB)" for one in found.ranking[:3])
    typer.echo(f"most sensitive by themselves, in dB of the outputs: {first}")
