# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export lint`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from perceiver_export.exporter.cli.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from perceiver_export.calibration.linting import Lint

_SHOWN = 8  # nodes of one rule


def lint(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL.onnx", help="A bundle, or an ONNX file.")],
    target: Annotated[str, typer.Option(help="tensorrt or tensorrt-rtx.")] = "tensorrt",
    version: Annotated[str | None, typer.Option(help="Of TensorRT, such as 8.6 or 10.3; the newest.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32: one of several lowered graphs.")] = None,
    json: JsonFlag = False,
) -> None:
    """Show what a version of TensorRT would refuse, not fuse, or not run in int8; exit 1 where it refuses something."""
    from perceiver_export.calibration import lint as lint_
    from perceiver_export.runtimes.errors import GateError

    results = lint_(bundle, target, version, precision)
    if json:
        print_json(results)
    else:
        for result in results:
            show_lint(result)
    refused = [finding for result in results for finding in result.findings if finding.kind == "refused"]
    if refused:
        raise GateError(f"{results[0].version} would refuse it: {refused[0].message}", refused[0].fix)


def show_lint(result: Lint) -> None:
    """A row a finding; more than a few of one rule are counted."""
    seen: Counter[str] = Counter()
    rows: list[tuple[str, ...]] = []
    for finding in result.findings:
        seen[finding.rule] += 1
        if seen[finding.rule] <= _SHOWN:
            rows.append((finding.kind, finding.rule, finding.node, finding.message, finding.fix))
    rows += [("", rule, f"{count - _SHOWN} more", "", "") for rule, count in seen.items() if count > _SHOWN]
    if rows:
        print_table(f"{result.graph} for {result.version}", ["", "rule", "node", "what", "what to do"], rows)
    else:
        typer.echo(f"{result.graph} for {result.version}: nothing found")
    typer.echo(f"attention: {result.fusable} of {result.attentions} are of a form that fuses")
