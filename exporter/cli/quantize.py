# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export quantize`; with `--search DATA --certify DATA`, mixed precision whose gates hold."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
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
    from perceiver_export.calibration.quantization.record import Calibration, GroupSensitivity
    from perceiver_export.calibration.quantization.search import Rung, Time
    from perceiver_export.runtimes.bundle import Bundle

_SPLITS = "give --search DATA and --certify DATA"


@dataclass(frozen=True)
class _Search:
    """Options that only have an effect with --search."""

    search: str | None = option(None, "Return layers to higher precision until the gates hold on this data.", "DATA")
    certify: str | None = option(None, "Certify the result of --search on this data, unseen by the search.", "DATA")
    device: str = option("auto", "With --search: the target to judge and time candidates on; `all`: every target.")
    least_gain: float = option(2.0, "With --search: time that a riskier mixture must at least save.", "PERCENT")
    for_size: bool = option(False, "With --search: minimize size, and accept a mixture that is smaller but not faster.")
    allow_overlap: bool = option(False, "With --search: continue even if the sets share samples.")


@dataclass(frozen=True)
class _Files:
    """Where the statistics come from (DATA, a share of it, or files of all shares), and where results go."""

    data: str | None = option(
        None, "Images, .npz by input name (or a directory of them), .jsonl text, module:function or `random`."
    )
    shard: str | None = option(None, "Run only this share of the calls: 3/16 is the third of 16 shards.", "I/N")
    statistics: str | None = option(None, "With --shard: write its statistics here.", "FILE.npz")
    merge: bool = option(False, "Quantize from the statistics of all shards, the PART.npz files, instead of DATA.")
    output: str | None = option(None, "Where to write the quantized bundle.", "BUNDLE2")
    sensitivity: Path | None = option(
        None, "Also measure each layer quantized alone, for this file and `profile`.", "FILE.json"
    )


_Parts = Annotated[list[Path] | None, typer.Argument(metavar="PART.npz", help="Statistics of shards, for --merge.")]


@ui.options_of(
    QuantizeOptions,
    _Search,
    _Files,
    precision=partial(ui.pair, option="--precision", example="'decoder.*=int8-weights'"),
)
def quantize(
    bundle: ui.BundleArgument, options: QuantizeOptions, how: _Search, files: _Files, parts: _Parts = None
) -> None:
    """Quantize a bundle to int8, calibrated on real data, and check that integer kernels really run it.

    The bundle is written only if they do. To quantize weights only, use --scheme int8-weights.
    """
    if files.sensitivity is not None:
        ui.check_output(files.sensitivity, (bundle, files.data, how.search, how.certify), ".json")
    if (how.search is None) != (how.certify is None):
        raise UsageError("a search needs two sets of samples", _SPLITS)
    given = [name for name, value in vars(how).items() if value != getattr(_Search(), name)]
    if given and how.search is None:
        raise UsageError(f"--{given[0].replace('_', '-')} has no effect without a search", f"{_SPLITS} with it")
    alone = not (given or files.sensitivity or options.gates.any)
    if files.shard is not None or files.statistics is not None:
        if files.output or parts or files.merge or not alone:
            hint = "pass -o, gates, --search and --sensitivity to a later command"
            raise UsageError("a shard writes statistics and nothing else", hint)
        _collect(bundle, files, options)
    elif files.output is None:
        raise UsageError("quantize needs an output", "give -o BUNDLE2")
    elif (files.data is None) != files.merge or (parts and not files.merge):
        raise UsageError("quantize needs either data or statistics", "give --data DATA, or --merge PART.npz …")
    elif files.data is None and not alone:
        raise UsageError("--search, --sensitivity and gates have no effect with --merge", "give --data instead")
    elif how.search is not None:
        _search_and_show(bundle, files, files.output, options, how)
    else:
        _quantize_and_show(bundle, files, files.output, options, parts or ())


def _collect(bundle: str, files: _Files, options: QuantizeOptions) -> None:
    """Write the statistics of a shard."""
    from perceiver_export.calibration import collect_statistics
    from perceiver_export.calibration.validation.options import parse_shard

    if files.data is None or files.shard is None or files.statistics is None:
        hint = "give --data DATA --shard 3/16 --statistics part3.npz"
        raise UsageError("a shard needs data, its number and a file", hint)
    shard, path = parse_shard(files.shard), Path(files.statistics)
    ui.check_output(path, (bundle, files.data), ".npz")
    with ui.progress_bar("quantize") as progress:
        collect_statistics(bundle, files.data, path, shard, options, progress=progress)
    ui.print_json({"shard": files.shard, "statistics": str(path)})
    ui.show_written(path)
    ui.say(f"perceiver-export quantize {shlex.quote(bundle)} --merge PART.npz … -o BUNDLE2", "next:")


def _quantize_and_show(
    bundle: str, files: _Files, output: str, options: QuantizeOptions, parts: Sequence[Path]
) -> None:
    from perceiver_export.calibration import quantize as quantize_
    from perceiver_export.calibration.quantization.record import read_calibration
    from perceiver_export.calibration.quantization.sensitivity import SAMPLES, measure_sensitivity

    groups: tuple[GroupSensitivity, ...] = ()
    with ui.progress_bar("quantize") as progress:
        if files.sensitivity is not None and files.data is not None:
            groups = measure_sensitivity(bundle, files.data, replace(options, samples=SAMPLES), progress=progress)
        made = quantize_(bundle, files.data, output, options, sensitivity=groups, progress=progress, statistics=parts)
        if files.sensitivity is not None:
            ui.write_json(files.sensitivity, groups)
    calibration = read_calibration(made)
    assert calibration is not None
    document = {"bundle": str(made.path), "manifest": made.manifest, "calibration": calibration}
    ui.print_json(document | ({} if files.sensitivity is None else {"sensitivity": groups}))
    made.path = Path(output)  # as it was typed
    _show_quantized(made, calibration)
    if groups:
        show = f"perceiver-export profile {shlex.quote(str(made.path))} --sort loss"
        ui.say(show, "each layer alone:")
    ui.show_written(made.path, files.sensitivity)
    command = shlex.join(["perceiver-export", "validate", str(made.path), "--data", "DATA", "--against", bundle])
    ui.say(command, "next:")


def _show_quantized(made: Bundle, calibration: Calibration) -> None:
    """Print the result: integer kernels and speed on each engine, the effect on outputs, and warnings."""
    data, quantization = calibration.data, made.manifest.quantization
    assert quantization is not None
    ui.say(f"quantized to {made.path} ({ui.mebibytes(made.num_bytes)}): {calibration.how}")
    ui.say(f"calibrated on {data.samples:,} samples of {data.source} (fingerprint {data.fingerprint[:16]})")
    times = {one.target: str(one) for one in calibration.speeds}
    rows = [(target, f"{share:.2%}", times.get(target, "")) for target, share in quantization.integer_share.items()]
    ui.print_table("", ["target", "integer kernels>", "a call"], rows)
    for effect in calibration.effects:
        agreement = "" if effect.agreement is None else f", the same answer in {effect.agreement:.1%}"
        on = f"{effect.samples:,} calibration sample{'s'[: effect.samples > 1]}"
        ui.say(f"{effect.output} against fp32, on {on}: SQNR {effect.sqnr:.1f} dB{agreement}")
    for reason in dict.fromkeys(quantization.kept_float.values()):
        names = [name for name, why in quantization.kept_float.items() if why == reason]
        ui.say(f"float: {', '.join(names)}: {reason}")
    for warning in calibration.warnings:
        ui.say(warning, "warning:")
    for gate in calibration.gates:
        ui.say(str(gate))


def _search_and_show(bundle: str, files: _Files, output: str, options: QuantizeOptions, how: _Search) -> None:
    """Search, then show a row for each mixture that was tried."""
    from perceiver_export.calibration import search

    given: dict[str, Any] = {**vars(how), "calibrate": files.data}
    given |= {"search_on": given.pop("search"), "certify_on": given.pop("certify")}
    with ui.progress_bar("search") as progress:
        found = search(bundle, output, options, **given, progress=progress)
    if files.sensitivity is not None:
        ui.write_json(files.sensitivity, found.ranking)
    ui.print_json(found)
    ui.say(f"tried {len(found.rungs)} of {found.ladder} rungs:")
    for index, rung in enumerate(found.rungs):
        ui.say(_shown(rung), f"  rung {rung.step}{', kept' if index == found.kept else ''}:")
    first = ", ".join(f"{one.group} ({one.output_sqnr:.1f} dB)" for one in found.ranking[:3])
    ui.say(f"most sensitive layers, each quantized alone (SQNR of the outputs): {first}")
    for certificate in found.certificates:
        ui.say(f"certified: {certificate}")
    if any(map(_with, found.rungs[found.kept].times)):
        ui.say("with --precision auto, load, run and build use the certified precision", "note:")
    for warning in found.warnings:
        ui.say(warning, "warning:")
    ui.show_written(output, files.sensitivity)


def _with(time: Time) -> str:
    return "" if time.precision == "fp32" else f" with {time.precision}"


def _shown(rung: Rung) -> str:
    counts = ", ".join(f"{count} to {scheme}" for scheme, count in sorted(Counter(rung.precision.values()).items()))
    names = ", ".join(list(rung.precision)[:2]) + (", …" if len(rung.precision) > 2 else "")
    times = ", ".join(
        f"{it.target}{_with(it)} {it.milliseconds:.2f} ms, {it.ratio:.2f} × {it.against}'s" for it in rung.times
    )
    searched, certified = (", ".join(one.split(":")[0] for one in said) for said in (rung.search, rung.certification))
    layers = f"{counts}: {names}" if counts else "no layer was raised"
    found = f"search split {searched}; certification {certified or 'not needed'}"
    return f"{layers}; {times}; {rung.size:.2f} × fp32's size; {found}"
