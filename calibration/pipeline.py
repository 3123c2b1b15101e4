# SPDX-License-Identifier: Apache-2.0
"""The quantize command's work: bundle + data -> one pass -> integers -> lowered graphs -> measured int8 bundle.

Neither NNCF nor onnxruntime.quantization is underneath, though both were meant to be: what they do well (statistics,
smoothing, bias correction) takes a few lines a method once one pass has collected the numbers, and what they do around
it is what a Perceiver cannot use. NNCF calibrates each use of a shared weight by itself, leaves the products of its
smoothing in the graph, and needs 150 MB of dependencies; onnxruntime's histograms hold every tensor of every sample,
and its writer makes int32 biases and a Q for each use of a tensor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.calibration.asked import asked_against_fp32
from perceiver_export.calibration.feeds import RANDOM, Data
from perceiver_export.calibration.metrics import family
from perceiver_export.calibration.observe import Observation, Report, observe
from perceiver_export.calibration.plan import Scheme, schemes_of
from perceiver_export.calibration.quantize_part import PartOptions, QuantizedPart, quantize_part
from perceiver_export.calibration.ranges import METHODS, Method
from perceiver_export.calibration.record import CALIBRATION, Calibration, read_calibration, write_calibration
from perceiver_export.calibration.result import Covered, compare, measure_kernels, require_coverage
from perceiver_export.calibration.statistics import scipy_stats
from perceiver_export.calibration.write import file_entries, file_entry, new_bundle, refuse_place
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.errors import GateError, UndecidedError, UsageError
from perceiver_export.runtimes.loading import check_threads
from perceiver_export.runtimes.machine import cpu_features, cpu_name, saturates
from perceiver_export.runtimes.manifest import Quantization, encode_manifest

_BITS = (7, 8)


def quantize(
    bundle: str | os.PathLike[str] | Bundle,
    data: Data,
    out: str | os.PathLike[str],
    *,
    scheme: Scheme = "int8",
    method: Method = "mse",
    samples: int = 128,
    smooth: bool = True,
    correct_bias: bool = True,
    weight_bits: int | None = None,
    precision: Mapping[str, Scheme] | None = None,
    keep_float: Sequence[str] = (),
    min_coverage: float = 100.0,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    max_metric_change: float | str | None = None,
    metric: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Report | None = None,
) -> Bundle:
    """Quantize a bundle, calibrated on DATA (`calibration.feeds`); nothing is written if anything fails.

    ``scheme``: int8 (weights and activations of linears), int8-weights, int4-weights; ``precision`` gives layers whose
    names match a pattern (`encoder.*.mlp.*`) another, ``keep_float`` none. ``method`` finds activations' ranges.
    ``weight_bits`` is 8, or 7 for x86 CPUs without VNNI; None takes what this machine needs. ``min_coverage`` is the
    least share, in percent, of the multiply-adds to be in int8 that must run in integer kernels, on each engine that is
    here. ``max_drop`` (points), ``min_agreement`` (percent) and ``max_metric_change`` of ``metric`` are `validate`'s
    gates against the fp32 bundle on DATA.

    Raises UsageError, DataError, BundleError, BundleExistsError, ExportError (the disk), MissingDependencyError;
    GateError where coverage or accuracy is below what was asked.
    """
    report = progress or (lambda what, done, total: None)
    path = Path(os.path.abspath(out))
    wishes: dict[str, Any] = {"smooth": smooth, "correct_bias": correct_bias, "weight_bits": weight_bits}
    check_numbers(samples, min_coverage, threads)
    refuse_place(path, overwrite, bundle)
    source = open_bundle(bundle)
    options = part_options(source, scheme, method, **wishes, precision=precision, keep_float=keep_float)
    gates = {"max_drop": max_drop, "min_agreement": min_agreement, "max_metric_change": max_metric_change}
    gated = _check_gates(source, data, {**gates, "metric": metric})
    observation = observe(source, data, samples, threads, report)
    with new_bundle(path, overwrite) as directory:
        write_quantized(source, options, observation, directory, path.name, min_coverage, report)
        compare_with_fp32(source, observation, directory, threads)
        if gated:
            _judge(directory, source, data, {**gates, "metric": metric, "threads": threads})
    report("done", 1, 1)
    return open_bundle(path)


def part_options(
    source: Bundle,
    scheme: Scheme = "int8",
    method: Method = "mse",
    *,
    smooth: bool = True,
    correct_bias: bool = True,
    weight_bits: int | None = None,
    precision: Mapping[str, Scheme] | None = None,
    keep_float: Sequence[str] = (),
) -> PartOptions:
    """`quantize`'s arguments of the same names, checked. Raises UsageError: they or the bundle do not fit."""
    if source.manifest.quantization is not None:
        raise UsageError(f"{source.path} is quantized already", "give the fp32 bundle that it was made from")
    schemes_of((), scheme, {})
    if scheme == "float":
        raise UsageError("scheme float leaves nothing to quantize", "use int8, int8-weights or int4-weights")
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", f"it is one of {', '.join(METHODS)}")
    if weight_bits not in (None, *_BITS):
        raise UsageError(
            f"weights of {weight_bits} bits are not made", "weight-bits is 7 or 8; int4-weights is a scheme"
        )
    wishes: dict[str, Scheme] = {**(precision or {}), **dict.fromkeys(keep_float, "float")}
    options = PartOptions(scheme, method, smooth, correct_bias, weight_bits or (7 if saturates() else 8), wishes)
    _check_patterns(source, options)
    return options


def write_quantized(
    source: Bundle,
    options: PartOptions,
    observation: Observation,
    directory: Path,
    name: str,
    min_coverage: float,
    report: Report,
) -> None:
    """All files of a quantized bundle, to be called ``name``; smoothing changes the observation's statistics.

    `compare_with_fp32` completes its record. Raises GateError: its coverage is below ``min_coverage``.
    """
    report("quantize", 0, 1)
    quantized = _write(source, options, observation, directory)
    report("measure", 0, 1)
    parts = {
        name: msgspec.structs.replace(part, lowered=quantized[name].lowered, stages=quantized[name].stages)
        for name, part in source.manifest.parts.items()
    }
    covered = measure_kernels(parts, quantized, observation.calls[0].feeds, directory)
    require_coverage(covered, min_coverage)
    calibration = _calibration(options, observation, quantized, covered)
    write_calibration(directory / CALIBRATION, calibration)
    manifest = msgspec.structs.replace(
        source.manifest,
        name=name,
        parts=parts,
        precision=options.scheme,
        files=file_entries(directory),
        notes=(*source.manifest.notes, *calibration.warnings),
        quantization=_quantization(options, quantized, covered, calibration),
    )
    (directory / "manifest.json").write_bytes(encode_manifest(manifest))


def compare_with_fp32(source: Bundle, observation: Observation, directory: Path, threads: int | None) -> None:
    """Into the record of the quantized bundle in ``directory``: its outputs and its speed against fp32's."""
    parts = open_bundle(directory, verify="never").manifest.parts
    compared = compare(source, parts, observation, directory, threads)
    _add_to_record(directory, compared.warnings, effects=compared.effects, speeds=compared.speeds)


def check_numbers(samples: int, min_coverage: float, threads: int | None) -> None:
    """Raise UsageError where a number of `quantize` makes no sense."""
    if samples < 1:
        raise UsageError(f"samples is {samples}", "give 1 or more; 128 are enough for most")
    if not 0.0 <= min_coverage <= 100.0:
        raise UsageError(f"min-coverage is {min_coverage}", "it is a percentage")
    check_threads(threads)


def _check_gates(source: Bundle, data: Data, gates: Mapping[str, Any]) -> bool:
    """Whether there are gates. Raises UsageError, before anything runs, where they cannot be held against DATA;
    MissingDependencyError without what bounds need.
    """
    if not asked_against_fp32(family(source.manifest), **gates).any:
        return False
    if not isinstance(data, (str, Path)):
        raise UsageError("accuracy gates need data that can be read twice", "give a path or module:function")
    if str(data) == RANDOM:
        raise UsageError("random numbers show no accuracy", "give real data with gates, or leave the gates out")
    scipy_stats()
    return True


def _check_patterns(source: Bundle, options: PartOptions) -> None:
    from perceiver_export.calibration.collect import load_graph
    from perceiver_export.calibration.linears import find_linears
    from perceiver_export.calibration.plan import check_patterns

    if not options.precision:
        return
    linears = [
        linear
        for part in source.manifest.parts.values()
        for linear in find_linears(load_graph(source.file(part.file)).graph)[0]
    ]
    check_patterns([linear.group for linear in linears], list(options.precision))
    if set(schemes_of(linears, options.scheme, options.precision).values()) == {"float"}:
        raise UsageError("no layer is left to quantize", "keep fewer of them float")


def _write(source: Bundle, options: PartOptions, observation: Observation, directory: Path) -> dict[str, QuantizedPart]:
    """Quantize every part and write the graphs with one file of weights; copy what else the bundle has."""
    import shutil

    from perceiver_export.calibration.graph_files import WEIGHTS, save_graphs

    parts = {
        name: quantize_part(source.file(part.file), part, observation.statistics[name], options)
        for name, part in source.manifest.parts.items()
    }
    save_graphs({file: model for part in parts.values() for file, model in part.models.items()}, directory)
    # What belongs to the fp32 graphs stays behind: they, their weights, and those of graphs lowered for a target.
    left = {WEIGHTS}
    for part in source.manifest.parts.values():
        left |= {part.file, *part.lowered.values(), *(f"{lowering}.weights" for lowering in part.lowered)}
    for name in source.manifest.files:
        if name not in left:
            shutil.copyfile(source.file(name), directory / name)
    return parts


def _calibration(
    options: PartOptions, observation: Observation, parts: Mapping[str, QuantizedPart], covered: Covered
) -> Calibration:
    return Calibration(
        scheme=options.scheme,
        method=options.method,
        weight_bits=options.weight_bits,
        smooth=options.smooth,
        correct_bias=options.correct_bias,
        precision=dict(options.precision),
        data=observation.data,
        parts={
            name: msgspec.structs.replace(part.record, coverage=covered.coverage[name]) for name, part in parts.items()
        },
        effects=(),
        speeds=(),
        machine=cpu_name(),
        instruction_set=cpu_features(),
        warnings=observation.data.warnings,
    )


def _quantization(
    options: PartOptions, parts: Mapping[str, QuantizedPart], covered: Covered, calibration: Calibration
) -> Quantization:
    return Quantization(
        scheme=options.scheme,
        method=options.method,
        weight_bits=options.weight_bits,
        int8_activations=any(one.scheme == "int8" for part in parts.values() for one in part.record.linears),
        integer_share=covered.shares,
        kept_float={name: reason for part in parts.values() for name, reason in part.kept_float.items()},
        random_data=calibration.data.source == RANDOM,
    )


def _judge(directory: Path, source: Bundle, data: Data, options: Mapping[str, Any]) -> None:
    """`validate`'s gates, into the record of a bundle before it is published. Raises GateError, UndecidedError."""
    from perceiver_export.calibration.validation import validate

    assert isinstance(data, (str, Path))
    found = validate(directory, data, against=source, **options)
    try:
        found.require()
    except UndecidedError as error:
        raise UndecidedError(f"{error.message}: nothing was written", error.hint) from error
    except GateError as error:
        raise GateError(
            f"{error.message}: nothing was written", "try --keep-float for the layers that `--sensitivity` puts first"
        ) from error
    _add_to_record(directory, gates=found.gates)


def _add_to_record(directory: Path, warnings: Sequence[str] = (), **found: Any) -> None:
    """What was measured of a bundle after it was written, into its calibration.json and manifest."""
    made = open_bundle(directory, verify="never")
    record = read_calibration(made)
    assert record is not None
    record = msgspec.structs.replace(record, warnings=(*record.warnings, *warnings), **found)
    write_calibration(directory / CALIBRATION, record)
    manifest = msgspec.structs.replace(
        made.manifest,
        files={**made.manifest.files, CALIBRATION: file_entry(directory / CALIBRATION)},
        notes=(*made.manifest.notes, *warnings),
    )
    (directory / "manifest.json").write_bytes(encode_manifest(manifest))
