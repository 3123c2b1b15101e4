# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export doctor`."""

from __future__ import annotations

import typer

from perceiver_export.exporter.cli.output import JsonFlag, print_json, print_table


def doctor(json: JsonFlag = False) -> None:
    """Show what this machine can run, and the command that brings each thing that is missing."""
    from perceiver_export.runtimes.diagnosis import doctor as doctor_
    from perceiver_export.runtimes.presence import devices

    findings, targets = doctor_(), devices()
    if json:
        print_json({"targets": targets, "findings": findings})
        return
    print_table("this machine", ["", "found", "needed for"], [(f.what, f.found, f.needed_for) for f in findings])
    if not targets:
        typer.echo("no target can run here yet")
    missing = [finding for finding in findings if finding.fix]
    if missing:
        print_table("what would bring the rest", ["", "command"], [(f.what, f.fix) for f in missing])
