# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export quantize`, and with `--search DATA --certify DATA` mixed precision that holds its gates."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perceiver_export.calibration.options import option
from perceiver_export.calibration.quantization.options import QuantizeOptions
from perceiver_export.exporter.cli import output as ui
from perceiver_export.runtimes.errors import UsageError

if TYPE_CHECKING:
    from perceiver_export.calibration.quantization.record import Calibration
    from perceiver_export.calibration.quantization.search import Rung
    from perceiver_export.calibration.quantization.sensitivity import GroupSensitivity
    from perceiver_export.runtimes.bundle import Bundle

_SPLITS = "give --search DATA and --certify DATA"


@dataclass(frozen=True)
class _Search:
    """Options that have an effect with --search only."""

    search: str | None = option(None, "Give layers back precision until the gates hold on this data.", "DATA")
    certify: str | None = option(None, "Certify the result of --search on this data, which it never saw.", "DATA")
    device: str = option("auto", "Of --search: the target to hold and time mixtures on; `all` for each present.")
    least_gain: float = option(2.0, "Of --search: time that a riskier mixture must save.", "PERCENT")
    for_size: bool = option(False, "Of --search: save size, and keep a mixture that is smaller but not faster.")
    allow_overlap: bool = option(False, "Of --search: go on though the sets share samples.")


@ui.options_of(
    QuantizeOptions, _Search, precision=partial(ui.pair, option="--precision", example="'decoder.*=int8-weights'")
)
def quantize(
    bundle: ui.BundleArgument,
    data: Annotated[
        str,
        typer.Option(
            help="Images, .npz by input name (or a directory of them), .jsonl of text, module:function; or `random`."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="BUNDLE2", help="Where the quantized bundle goes.")],
    options: QuantizeOptions,
    how: _Search,
    sensitivity: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Also measure each layer by itself, for this file and `profile`."),
    ] = None,
    json: ui.JsonFlag = False,
) -> None:
    """Quantize a bundle to int8, calibrated on real data, and check that integer kernels really run it.

    Nothing is written unless they do. Weights alone: --scheme int8-weights.
    """
    if sensitivity is not None:
        ui.check_output(sensitivity, (bundle, data, how.search, how.certify), ".json")
        ui.check_file(sensitivity)
    if (how.search is None) != (how.certify is None):
        raise UsageError("a search needs two sets of samples", _SPLITS)
    if how.search is not None:
        _search_and_show(bundle, data, output, json, sensitivity, options, how)
        return
    if given := [name for name, value in vars(how).items() if value != getattr(_Search(), name)]:
        raise UsageError(f"--{given[0].replace('_', '-')} has no effect without a search", f"{_SPLITS} with it")
    _quantize_and_show(bundle, data, output, json, sensitivity, options)


def _quantize_and_show(
    bundle: str, data: str, output: str, json: bool, sensitivity: Path | None, options: QuantizeOptions
) -> None:
    from perceiver_export.calibration import quantize as quantize_
    from perceiver_export.calibration.quantization.record import read_calibration
    from perceiver_export.calibration.quantization.sensitivity import SAMPLES, measure_sensitivity

    groups: tuple[GroupSensitivity, ...] = ()
    with ui.progress_bar("quantize", quiet=json) as progress:
        if sensitivity is not None:
            groups = measure_sensitivity(bundle, data, replace(options, samples=SAMPLES), progress=progress)
        made = quantize_(bundle, data, output, options, sensitivity=groups, progress=progress)
        if sensitivity is not None:
            ui.write_json(sensitivity, groups)
    calibration = read_calibration(made)
    assert calibration is not None
    if json:
        document = {"bundle": str(made.path), "manifest": made.manifest, "calibration": calibration}
        ui.print_json(document | ({} if sensitivity is None else {"sensitivity": groups}))
        return
    _show_quantized(made, calibration)
    if groups:
        ui.say(f"each layer by itself: perceiver-export profile {shlex.quote(str(made.path))} --sort loss")
    command = shlex.join(["perceiver-export", "validate", str(made.path), "--data", "DATA", "--against", bundle])
    ui.say(f"next: {command}")


def _show_quantized(made: Bundle, calibration: Calibration) -> None:
    """The result: outputs, integer kernels and speed on each engine, and the warnings."""
    data, quantization = calibration.data, made.manifest.quantization
    assert quantization is not None
    ui.say(f"quantized to {made.path} ({ui.mebibytes(made.num_bytes)}): {calibration.how}")
    ui.say(f"calibrated on {data.samples:,} samples of {data.source} (fingerprint {data.fingerprint[:16]})")
    rows = [
        (f"{target}: int8 multiply-adds in integer kernels", f"{share:.2%}")
        for target, share in quantization.integer_share.items()
    ]
    rows += [(f"{one.target}: a call", str(one)) for one in calibration.speeds]
    for effect in calibration.effects:
        agreement = "" if effect.agreement is None else f", same answer in {effect.agreement:.1%}"
        rows.append((f"output {effect.output} against fp32", f"{effect.sqnr:.1f} dB{agreement}"))
    note = "outputs of a few calibration samples; `validate` measures the accuracy"
    ui.print_table("quantized", ["", "measured"], rows, note)
    for name, reason in quantization.kept_float.items():
        ui.say(f"float: {name}: {reason}")
    for warning in calibration.warnings:
        ui.say(warning, "warning:")
    for gate in calibration.gates:
        ui.say(str(gate))


def _search_and_show(
    bundle: str, data: str, output: str, json: bool, sensitivity: Path | None, options: QuantizeOptions, how: _Search
) -> None:
    """Search, then show a row for each mixture that was tried."""
    from perceiver_export.calibration import search

    given: dict[str, Any] = {
        "calibrate": data,
        "search_on": how.search,
        "certify_on": how.certify,
        "device": how.device,
    }
    given |= {"least_gain": how.least_gain, "for_size": how.for_size, "allow_overlap": how.allow_overlap}
    with ui.progress_bar("search", quiet=json) as progress:
        found = search(bundle, output, options, **given, progress=progress)
    if sensitivity is not None:
        ui.write_json(sensitivity, found.ranking)
    if json:
        ui.print_json(found)
        return
    columns = [
        "rung>",
        "layers that went back",
        "a call",
        "size, of fp32's>",
        "on the search split",
    ]
    rows = [(*_row(rung), "kept" if index == found.kept else "") for index, rung in enumerate(found.rungs)]
    ui.print_table(f"tried of {found.ladder} rungs", [*columns, "certification", ""], rows)
    first = ", ".join(f"{one.group} ({one.output_sqnr:.1f} dB)" for one in found.ranking[:3])
    ui.say(f"most sensitive by themselves, in dB of the outputs: {first}")
    for certificate in found.certificates:
        ui.say(f"certified: {certificate}")
    for warning in found.warnings:
        ui.say(warning, "warning:")
    ui.say(f"written to {output}")


def _row(rung: Rung) -> tuple[str, ...]:
    counts = ", ".join(f"{count} to {scheme}" for scheme, count in sorted(Counter(rung.precision.values()).items()))
    names = ", ".join(list(rung.precision)[:2]) + (", …" if len(rung.precision) > 2 else "")
    times = ", ".join(
        f"{time.target} {time.milliseconds:.2f} ms, {time.ratio:.2f} × {time.against}'s" for time in rung.times
    )
    searched, certified = (
        ", ".join(text.partition(":")[0] for text in said) for said in (rung.search, rung.certification)
    )
    layers = f"{counts}: {names}" if counts else "none"
    return str(rung.step), layers, times, f"{rung.size:.2f} ×", searched, certified or "not needed"
