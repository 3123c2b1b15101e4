# SPDX-License-Identifier: Apache-2.0
"""How commands show labels: a row an input, the most probable label first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_export.exporter.cli.files import write_json
from perceiver_export.exporter.cli.output import print_json, print_table
from perceiver_export.exporter.cli.run_options import RunOptions

if TYPE_CHECKING:
    from perceiver_export.runtimes.tasks.prediction import Prediction


def title(bundle: str, where: Mapping[str, Any]) -> str:
    """Which bundle ran on what, in the precision of the engine that was taken."""
    version = where["version"].partition("-")[0]  # OpenVINO's goes on with its branch
    return f"{bundle} on {where['engine']} {version}, {where['device']}, {where['precision']}"


def ranked(predictions: Sequence[Prediction]) -> list[str]:
    """Labels with their probabilities, a cell each."""
    return [f"{prediction.label}  {prediction.probability:.1%}" for prediction in predictions]


@dataclass(frozen=True)
class LabelAnswer:
    """What was given, and its labels."""

    input: str
    labels: list[Prediction]


def show_labels(
    bundle: str,
    what: str,
    answers: Sequence[LabelAnswer],
    where: Mapping[str, Any],
    output: Path | None,
    options: RunOptions,
    note: str = "",
) -> None:
    """Write the answers where ``output`` says so, and print them as the options say. Raises InputError."""
    document = {"runtime": where, "answers": answers}
    if output is not None:
        write_json(output, document)
    if options.json:
        print_json(document)
        return
    rows = [(answer.input, *ranked(answer.labels)) for answer in answers]
    ranks = [f"{rank}." for rank in range(1, max(map(len, rows)))]
    print_table(title(bundle, where), [what, *ranks], rows, note)
