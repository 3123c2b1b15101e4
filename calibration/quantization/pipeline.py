# SPDX-License-Identifier: Apache-2.0
"""`quantize()`: bundle + data -> one pass -> integers -> lowered graphs -> measured int8 bundle.

It uses neither NNCF nor onnxruntime.quantization, although both were considered. The parts they do well (statistics,
smoothing, bias correction) take a few lines each after one pass has collected the numbers, and the rest does not suit a
Perceiver. NNCF calibrates each use of a shared weight separately, leaves the products of its smoothing in the graph,
and needs 150 MB of dependencies. onnxruntime's histograms hold every tensor of every sample, and it writes int32 biases
and a Q for each use of a tensor.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from msgspec import structs

from perceiver_export.calibration.bundles import absolute_place, file_entries, new_bundle, refuse_place, write_record
from perceiver_export.calibration.data.sources import RANDOM, Data
from perceiver_export.calibration.graphs import WEIGHTS, load_graph, save_graphs
from perceiver_export.calibration.quantization import engines
from perceiver_export.calibration.quantization.integers import schemes_of
from perceiver_export.calibration.quantization.linears import find_linears
from perceiver_export.calibration.quantization.options import QuantizeOptions
from perceiver_export.calibration.quantization.part import QuantizedPart, quantize_part
from perceiver_export.calibration.quantization.record import Calibration, Coverage, GroupSensitivity, read_calibration
from perceiver_export.calibration.quantization.shards import merge_statistics, write_statistics
from perceiver_export.calibration.quantization.statistics import Observation, Report, observe
from perceiver_export.calibration.validation.gates import check_against_fp32
from perceiver_export.calibration.validation.options import ValidateOptions, check_shard
from perceiver_export.calibration.validation.statistics import scipy_stats
from perceiver_export.runtimes.bundle import Bundle, BundleLike, open_bundle
from perceiver_export.runtimes.errors import GateError, UsageError, check_kind
from perceiver_export.runtimes.files import replacing, writing
from perceiver_export.runtimes.machine import cpu_features, cpu_name
from perceiver_export.runtimes.manifest import Manifest, Quantization


def quantize(
    bundle: BundleLike,
    data: Data | None,
    output: str | os.PathLike[str],
    options: QuantizeOptions = QuantizeOptions(),
    *,
    sensitivity: Sequence[GroupSensitivity] = (),
    progress: Report | None = None,
    statistics: Sequence[Path] = (),
) -> Bundle:
    """Quantize a bundle, calibrated on DATA (`calibration.data`). Nothing is written if anything fails.

    Without DATA, the ``statistics`` of all shards (`collect_statistics`) give the same graphs. Texts in DATA that are
    too long for the model are skipped with a note, or cut with ``options.truncate``. ``sensitivity``, the result of
    `measure_sensitivity`, is kept in the record for `profile`.

    Raises UsageError, DataError, BundleError, BundleExistsError, MissingDependencyError; ExportError if the disk is
    full or not writable; GateError if coverage or accuracy is lower than ``options`` require.
    """
    report = progress or (lambda what, done, total: None)
    path, source = absolute_place(output), open_bundle(bundle)
    check_options(options, source)
    refuse_place(path, options.overwrite, source)
    if options.gates.any:
        _check_gateable(data)
    if data is None:
        observation = merge_statistics(source, statistics, options)
    else:
        observation = observe(source, data, options, report)
    with new_bundle(path, options.overwrite) as directory:
        write_quantized(source, options, observation, directory, path.name, report)
        complete_record(source, observation, directory, options.threads, sensitivity)
        if options.gates.any and data is not None:
            _check_gates(directory, source, data, options)
    report("done", 1, 1)
    return open_bundle(path)


def collect_statistics(
    bundle: BundleLike,
    data: Data,
    output: Path,
    shard: tuple[int, int],
    options: QuantizeOptions = QuantizeOptions(),
    *,
    progress: Report | None = None,
) -> None:
    """Write the statistics of shard i of n to an .npz file. Raises the errors of `quantize`, and InputError."""
    check_shard(shard)
    source = open_bundle(bundle)
    check_options(options, source)
    observation = observe(source, data, options, progress or (lambda what, done, total: None), shard)
    with writing(output), replacing(output) as temporary:
        write_statistics(temporary, source, shard, options, observation)


def check_options(options: QuantizeOptions, source: Bundle) -> None:
    """Raise UsageError if the bundle is already quantized, or ``options`` do not match its layers."""
    check_kind("options", options, QuantizeOptions, "QuantizeOptions")
    check_against_fp32(options.gates, source.manifest)
    if source.manifest.quantization is not None:
        raise UsageError(f"{source.path} is already quantized", "give the fp32 bundle from which it was made")
    if not options.schemes:
        return
    linears = [
        linear
        for part in source.manifest.parts.values()
        for linear in find_linears(load_graph(source.file(part.file)).graph)[0]
    ]
    groups = sorted({linear.group for linear in linears})
    for pattern in options.schemes:
        if not any(fnmatchcase(group, pattern) for group in groups):
            near = ", ".join(groups[:4])
            raise UsageError(f"no layer matches {pattern!r}", f"use names such as {near}; `--sensitivity` lists all")
    if set(schemes_of(linears, options.scheme, options.schemes).values()) == {"float"}:
        raise UsageError("all layers stay float", "keep fewer layers float")


def write_quantized(
    source: Bundle,
    options: QuantizeOptions,
    observation: Observation,
    directory: Path,
    name: str,
    report: Report,
    raised: Collection[str] = (),
) -> None:
    """Write all files of a quantized bundle that will be named ``name``. It changes the observation's statistics.

    `complete_record` adds measurements. ``raised`` has the groups that a search raised to a higher precision.
    Raises GateError if the coverage is below ``options.min_coverage``.
    """
    report("quantize", 0, 1)
    parts = {
        key: quantize_part(source.file(part.file), part, observation.statistics[key], options, raised)
        for key, part in source.manifest.parts.items()
    }
    save_graphs({file: model for part in parts.values() for file, model in part.models.items()}, directory)
    _copy_others(source, directory)
    report("measure", 0, 1)
    coverage = _measure_kernels(parts, observation, directory)
    by_target = engines.by_target(coverage)
    engines.require_coverage(by_target, options.min_coverage)
    quantization = Quantization(
        scheme=options.scheme,
        method=options.method,
        weight_bits=options.bits,
        int8_activations=any(one.integer_linears for one in parts.values()),
        integer_share={target: one.share for target, one in by_target.items()},
        kept_float={layer: reason for one in parts.values() for layer, reason in one.kept_float.items()},
        random_data=observation.data.source == RANDOM,
    )
    manifest = structs.replace(
        source.manifest,
        name=name,
        parts={key: one.part for key, one in parts.items()},
        precision=options.scheme,
        files=file_entries(directory),
        quantization=quantization,
    )
    record = _record(options, observation, parts, coverage)
    _write_record(directory, manifest, record, observation.data.warnings)


def _measure_kernels(
    parts: Mapping[str, QuantizedPart], observation: Observation, directory: Path
) -> dict[str, tuple[Coverage, ...]]:
    """By part, the kernels in every engine on this machine; empty for a part without integer linear layers."""
    described = {key: one.part for key, one in parts.items()}
    graphs = {target: engines.graphs_for(target, described, directory) for target in engines.targets()}
    return {
        key: tuple(
            engines.measure_coverage(target, files[key], one.integer_linears, observation.calls[0].feeds[key])
            for target, files in graphs.items()
            if one.integer_linears
        )
        for key, one in parts.items()
    }


def _record(
    options: QuantizeOptions,
    observation: Observation,
    parts: Mapping[str, QuantizedPart],
    coverage: Mapping[str, tuple[Coverage, ...]],
) -> Calibration:
    return Calibration(
        scheme=options.scheme,
        method=options.method,
        weight_bits=options.bits,
        smooth=options.smooth,
        correct_bias=options.correct_bias,
        precision=dict(options.schemes),
        data=observation.data,
        parts={key: structs.replace(one.record, coverage=coverage[key]) for key, one in parts.items()},
        machine=cpu_name(),
        instruction_set=cpu_features(),
    )


def _copy_others(source: Bundle, directory: Path) -> None:
    """Copy the source's files except its graphs, its lowered graphs, and the weights of both."""
    left = {WEIGHTS}
    for part in source.manifest.parts.values():
        left |= {part.file, *part.lowered.values(), *(f"{lowering}.weights" for lowering in part.lowered)}
    for name in source.manifest.files:
        if name not in left:
            shutil.copyfile(source.file(name), directory / name)


def complete_record(
    source: Bundle, observation: Observation, directory: Path, threads: int | None, alone: Sequence[GroupSensitivity]
) -> None:
    """Compare the bundle in ``directory`` with the float one, and record the outputs' SQNR and the speed. ``alone`` is
    recorded too: for each linear layer, the SQNR of the outputs with only that layer quantized.
    """
    made, record = _recorded(directory)
    graphs = {target: engines.graphs_for(target, made.manifest.parts, directory) for target in engines.targets()}
    effects = engines.measure_effects(source.manifest, graphs["ort-cpu"], observation.calls, threads)
    fp32 = {name: source.file(part.file) for name, part in source.manifest.parts.items()}
    size = made.num_bytes / source.num_bytes
    speeds = tuple(
        engines.measure_speed(target, fp32, quantized, made.manifest.precision, observation.calls[0], threads)
        for target, quantized in graphs.items()
    )
    warnings = [
        f"the times on {one.target} do not show whether {one.best[1]} is faster than {one.best[0]}: {one.undecided}; "
        "run `bench` with --against on a quiet machine"
        if one.undecided
        else f"not faster than {one.best[0]} on {one.target} on the machine that quantized it"
        + (", only smaller" if size < 1 else ", and not smaller")
        + f": {size:.2f} × fp32's size"
        for one in speeds
        if not one.faster
    ]
    found = {(one.part, one.group): one.output_sqnr for one in alone}
    parts = {}
    for name, part in record.parts.items():
        linears = (structs.replace(one, output_sqnr=found.get((name, one.group))) for one in part.linears)
        parts[name] = structs.replace(part, linears=tuple(linears))
    record = structs.replace(record, effects=effects, speeds=speeds, parts=parts)
    _write_record(directory, made.manifest, record, warnings)


def _recorded(directory: Path) -> tuple[Bundle, Calibration]:
    made = open_bundle(directory, verify="never")
    record = read_calibration(made)
    assert record is not None
    return made, record


def _write_record(directory: Path, manifest: Manifest, record: Calibration, warnings: Sequence[str] = ()) -> None:
    """Write calibration.json and the manifest, with ``warnings`` added to both."""
    record = structs.replace(record, warnings=(*record.warnings, *warnings))
    write_record(directory, structs.replace(manifest, notes=(*manifest.notes, *warnings)), record)


def _check_gateable(data: Data | None) -> None:
    """Check before anything runs that DATA can be used for gates.

    Raises UsageError if it cannot, MissingDependencyError if the library that computes bounds is missing.
    """
    if not isinstance(data, (str, Path)):
        raise UsageError("accuracy gates need data that can be read twice", "give a path or module:function")
    if str(data) == RANDOM:
        raise UsageError("random numbers cannot show accuracy", "give real data with gates, or omit the gates")
    scipy_stats()


def _check_gates(directory: Path, source: Bundle, data: Data, options: QuantizeOptions) -> None:
    """Check `validate`'s gates and add them to the record. Raises GateError and its subclasses."""
    from perceiver_export.calibration.validation.validation import validate

    assert isinstance(data, (str, Path))
    asked = ValidateOptions(source, options.gates, threads=options.threads, truncate=options.truncate)
    found = validate(directory, data, asked)
    try:
        found.require()
    except GateError as error:
        fails = type(error) is GateError  # not undecided or vacuous
        hint = "use --keep-float for the layers that `--sensitivity` lists first" if fails else error.hint
        raise type(error)(f"{error.message}: nothing was written", hint) from error
    made, record = _recorded(directory)
    _write_record(directory, made.manifest, structs.replace(record, gates=found.gates))
