# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export quantize`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perceiver_export.exporter.cli.files import check_output
from perceiver_export.exporter.cli.output import (
    BundleArgument,
    JsonFlag,
    ThreadsOption,
    mebibytes,
    print_json,
    print_table,
    progress_bar,
)
from perceiver_export.runtimes.errors import UsageError

if TYPE_CHECKING:
    from perceiver_export.calibration.record import Calibration
    from perceiver_export.calibration.sensitivity import GroupSensitivity
    from perceiver_export.runtimes.bundle import Bundle


def quantize(
    bundle: BundleArgument,
    data: Annotated[
        str,
        typer.Option(
            help="Pictures, .npz by input name (or a directory of them), .jsonl of text, module:function; or `random`."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="BUNDLE2", help="Where the quantized bundle goes.")],
    scheme: Annotated[str, typer.Option(help="int8, int8-weights or int4-weights.")] = "int8",
    method: Annotated[str, typer.Option(help="How ranges are found: mse, minmax, percentile or entropy.")] = "mse",
    samples: Annotated[int, typer.Option(help="Calibrate on so many samples, evenly spread over the data.")] = 128,
    keep_float: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Layers that stay float: names, or patterns (decoder.*).")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SCHEME", help="Another scheme for some layers.")
    ] = None,
    weight_bits: Annotated[
        int | None, typer.Option(help="8, or 7 for x86 CPUs without VNNI. By default what this machine needs.")
    ] = None,
    smooth: Annotated[bool, typer.Option(help="Fold SmoothQuant into LayerNorms and value projections.")] = True,
    correct_bias: Annotated[bool, typer.Option(help="Take the mean error out of biases.")] = True,
    min_coverage: Annotated[
        float, typer.Option(help="Least share of int8 multiply-adds in integer kernels, in percent.")
    ] = 100.0,
    max_drop: Annotated[
        float | None, typer.Option(help="Largest fall of top-1 below fp32 on the data, in points.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Least lower 95 % bound of agreement with fp32 on the data, in percent.")
    ] = None,
    max_metric_change: Annotated[
        str | None, typer.Option(metavar="X", help="Largest worsening of --metric on the data: 0.05, or 2%.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="The metric of --max-metric-change: one of the task's, or module:function.")
    ] = None,
    search_on: Annotated[
        str | None,
        typer.Option("--search", metavar="DATA", help="Give layers back precision until the gates hold on this data."),
    ] = None,
    certify_on: Annotated[
        str | None,
        typer.Option("--certify", metavar="DATA", help="Certify what --search found on this data, which it never saw."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Of --search: the target to hold and time mixtures on; `all` for each that is present.")
    ] = "auto",
    least_gain: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Of --search: time that a riskier mixture must save; 2 by default."),
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Of --search: go on though the sets share samples.")
    ] = False,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also measure each layer by itself: .json, .svg or .png; the worst are printed."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is already there.")] = False,
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Quantize a bundle to int8, calibrated on real data, and check that it really runs in integer kernels.

    Nothing is written unless it does. Weights alone: --scheme int8-weights.
    """
    if sensitivity is not None:
        from perceiver_export.calibration.sensitivity import check_file

        check_file(sensitivity)
        check_output(sensitivity, (bundle, data, search_on, certify_on))
    wishes: dict[str, Any] = {"scheme": scheme, "method": method, "smooth": smooth, "correct_bias": correct_bias}
    wishes |= {"weight_bits": weight_bits, "keep_float": keep_float or ()}
    wishes["precision"] = dict(map(_parse_precision, precision or ()))
    common: dict[str, Any] = {"samples": samples, "min_coverage": min_coverage, "max_drop": max_drop}
    common |= {"min_agreement": min_agreement, "max_metric_change": max_metric_change, "metric": metric}
    common |= {"overwrite": overwrite, "threads": threads}
    if _searches(search_on, certify_on, {"--device": device != "auto", "--allow-overlap": allow_overlap}, least_gain):
        from perceiver_export.exporter.cli.search import search_and_show

        splits = {"calibrate": data, "search_on": search_on, "certify_on": certify_on, "allow_overlap": allow_overlap}
        common["least_gain"] = 2.0 if least_gain is None else least_gain
        search_and_show(bundle, output, json, sensitivity, **splits, device=device, **common, **wishes)
    else:
        _quantize_and_show(bundle, data, output, json, sensitivity, common, wishes)


def _quantize_and_show(
    bundle: str,
    data: str,
    output: str,
    json: bool,
    sensitivity: Path | None,
    common: dict[str, Any],
    wishes: dict[str, Any],
) -> None:
    """`calibration.pipeline`, each layer by itself where that was asked for, and what came of it."""
    from perceiver_export.calibration import quantize as quantize_
    from perceiver_export.calibration.record import read_calibration
    from perceiver_export.calibration.sensitivity import measure_sensitivity, write_sensitivity

    groups = None
    with progress_bar("quantize", quiet=json) as progress:
        made = quantize_(bundle, data, output, progress=progress, **common, **wishes)
        if sensitivity is not None:
            groups = measure_sensitivity(bundle, data, threads=common["threads"], progress=progress, **wishes)
            write_sensitivity(sensitivity, groups)
    calibration = read_calibration(made)
    assert calibration is not None
    if json:
        document = {"bundle": str(made.path), "manifest": made.manifest, "calibration": calibration}
        print_json(document | ({"sensitivity": groups} if groups is not None else {}))
        return
    show_quantized(made, calibration)
    if groups is not None:
        show_sensitivity(groups, sensitivity)
    command = shlex.join(["perceiver-export", "validate", str(made.path), "--data", "DATA", "--against", bundle])
    typer.echo(f"next: {command}")


def _searches(
    search_on: str | None, certify_on: str | None, only_then: dict[str, bool], least_gain: float | None
) -> bool:
    """Whether to search. Raises UsageError where an option would have no effect."""
    if (search_on is None) != (certify_on is None):
        raise UsageError("a search needs two sets of samples", "give --search DATA and --certify DATA")
    given = [name for name, said in {**only_then, "--least-gain": least_gain is not None}.items() if said]
    if search_on is None and given:
        raise UsageError(f"{given[0]} has no effect without a search", "give --search DATA and --certify DATA with it")
    return search_on is not None


def show_quantized(made: Bundle, calibration: Calibration) -> None:
    """What came of it: outputs, integer kernels and speed on each engine, and what to be warned of."""
    data = calibration.data
    size = sum(entry.size for entry in made.manifest.files.values())
    typer.echo(f"quantized to {made.path} ({mebibytes(size)}): {calibration.how}")
    typer.echo(f"calibrated on {data.samples:,} samples of {data.source} (fingerprint {data.fingerprint[:16]})")
    assert made.manifest.quantization is not None
    rows = [
        (f"{target}: int8 multiply-adds in integer kernels", f"{share:.2%}")
        for target, share in made.manifest.quantization.integer_share.items()
    ]
    rows += [
        (f"{one.target}: a call", f"{one.quantized:.2f} ms, fp32 {one.fp32:.2f} ms: {one.ratio:.2f} × as fast")
        for one in calibration.speeds
    ]
    for effect in calibration.effects:
        agreement = "" if effect.agreement is None else f", same best score in {effect.agreement:.1%}"
        rows.append((f"output {effect.output} against fp32", f"{effect.sqnr:.1f} dB{agreement}"))
    print_table(
        "quantized", ["", "measured"], rows, "outputs are of a few calibration samples; `validate` tells the accuracy"
    )
    for name, reason in made.manifest.quantization.kept_float.items():
        typer.echo(f"float: {name}: {reason}")
    for warning in calibration.warnings:
        typer.echo(typer.style("warning:", fg="yellow", bold=True) + f" {warning}")
    for gate in calibration.gates:
        typer.echo(str(gate))


def show_sensitivity(groups: tuple[GroupSensitivity, ...], file: Path | None) -> None:
    """Layers, the worst first; the rest is in ``file``."""
    rows = [(one.group, f"{one.output_sqnr:.1f}", f"{one.product_sqnr:.1f}", f"{one.share:.1%}") for one in groups[:20]]
    more = f"{len(groups) - 20} more are in {file}" if len(groups) > 20 else ""
    print_table(
        "each layer quantized by itself, the worst first",
        ["layer", "outputs, dB>", "product, dB>", "work>"],
        rows,
        more,
    )


def _parse_precision(text: str) -> tuple[str, str]:
    name, equals, scheme = text.rpartition("=")
    if not equals or not name:
        raise UsageError(f"--precision {text!r} is not NAME=SCHEME", "for example --precision 'decoder.*=int8-weights'")
    return name, scheme
