# SPDX-License-Identifier: Apache-2.0
"""The commands that make a bundle again, as far as it knows: what it does not know stands in capitals."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from perceiver_export.calibration.feeds import ITERABLE
from perceiver_export.calibration.record import Calibration
from perceiver_export.runtimes.manifest import Manifest

_SOURCE, _FP32, _DATA = "SOURCE", "BUNDLE0", "DATA"
_MIB = 1 << 20


def made_by(manifest: Manifest, record: Calibration | None) -> Iterator[str]:
    """`export`, and `quantize` of a quantized bundle, after a comment on what they leave open."""
    source, name = _source(manifest), _FP32 if record is not None else manifest.name
    called = f" SOURCE was called {manifest.source}." if source == _SOURCE else ""
    yield (
        "# As far as the bundle knows; capitals stand for what it does not."
        f"{called} --config, --task and the --shape of inputs are not in it."
    )
    yield _line("export", source, "-o", name, *_export_options(manifest))
    if record is not None:
        data = _DATA if record.data.source == ITERABLE else record.data.source
        yield _line("quantize", _FP32, "--data", data, "-o", manifest.name, *_quantize_options(record))


def _source(manifest: Manifest) -> str:
    """What was exported, where its name says it all: of a checkpoint the bundle knows no folder and no format."""
    name = manifest.source.removesuffix(" (random weights)")
    return name if name.startswith("preset:") or re.fullmatch(r"[\w.]+:\w+", name) else _SOURCE


def _export_options(manifest: Manifest) -> Iterator[str]:
    first, *_ = parts = tuple(manifest.parts.values())
    if manifest.parity != "own":
        yield from ("--parity", manifest.parity)
    spec = first.inputs[0]
    if spec.shape[0] != 1:
        least, most = spec.ranges.get(str(spec.shape[0]), (0, 0))
        yield from ("--batch", f"{least}:OPT:{most}" if isinstance(spec.shape[0], str) else str(spec.shape[0]))
    yield "--split" if len(parts) > 1 else "--no-split"
    asked = {size for part in parts[1:] for spec in part.inputs if spec.name == "queries" for size in spec.shape[1:2]}
    if any(isinstance(size, str) for size in asked):
        yield "--dynamic-queries"
    elif len(asked) == 1:
        yield from ("--shape", f"queries={asked.pop()}")
    if first.plan is None:
        yield "--no-fold"
    else:
        budget = first.plan.budget
        yield from ("--memory-budget", f"{budget // _MIB}MiB" if budget % _MIB == 0 else str(budget))


def _quantize_options(record: Calibration) -> Iterator[str]:
    yield from ("--scheme", record.scheme, "--method", record.method, "--samples", str(record.data.samples))
    yield from ("--weight-bits", str(record.weight_bits))
    if not record.smooth:
        yield "--no-smooth"
    if not record.correct_bias:
        yield "--no-correct-bias"
    for name, scheme in record.precision.items():
        yield from ("--precision", f"{name}={scheme}")


def _line(*words: str) -> str:
    return shlex.join(["perceiver-export", *words])
