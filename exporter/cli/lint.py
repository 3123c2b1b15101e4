# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export lint`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from perceiver_export.exporter.cli.output import JsonFlag, mebibytes, print_json, print_table

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
    """A row for what is wrong and how to mend it, with the nodes that it is true of; more than a few are counted."""
    nodes: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in result.findings:
        nodes.setdefault((finding.kind, finding.rule, finding.message, finding.fix), []).append(finding.node)
    rows = [(kind, rule, _listed(names), message, fix) for (kind, rule, message, fix), names in nodes.items()]
    if rows:
        print_table(f"{result.graph} for {result.version}", ["", "rule", "node", "what", "what to do"], rows)
    else:
        typer.echo(f"{result.graph} for {result.version}: nothing found")
    typer.echo(f"attention: {result.fusable} of {result.attentions} become one kernel")
    reasons: dict[str, list[str]] = {}
    for node, reason in result.unfused.items():
        reasons.setdefault(reason, []).append(node)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        typer.echo(f"  {len(names)} not: {names[0]}{more} ({reason})")
    once, each = mebibytes(result.weight_bytes), mebibytes(result.bytes_each_use)
    copied = "" if once == each else f"; {each} if an engine had a copy for each use"
    typer.echo(f"weights: {once} as the graph stores them{copied}")


def _listed(nodes: list[str]) -> str:
    more = [f"and {len(nodes) - _SHOWN} more"] if len(nodes) > _SHOWN else []
    return "\n".join(nodes[:_SHOWN] + more)
