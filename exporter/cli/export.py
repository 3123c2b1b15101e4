# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export export`, `presets`, `inspect` and `package`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perceiver_export.exporter.cli import output as ui
from perceiver_export.exporter.cli.run import example_input
from perceiver_export.exporter.pipeline import ExportOptions
from perceiver_export.runtimes.errors import UsageError, printable
from perceiver_export.runtimes.presence import advice_here

if TYPE_CHECKING:
    from perceiver_export.calibration.quantization.record import Calibration
    from perceiver_export.exporter.describe import Inspection
    from perceiver_export.exporter.model.config import Input
    from perceiver_export.exporter.presets import Preset
    from perceiver_export.runtimes.bundle import Bundle
    from perceiver_export.runtimes.manifest import Part

_PRESETS_NOTE = (
    "FLOPs are for one sample with all queries of the model; a multiply-add is two FLOPs. Below: the paper's figure,"
    " and this model's difference from it."
)
_NEXT = {
    "triton": "tritonserver --model-repository {path}",
    "ovms": "docker run -p 9000:9000 -v {path}:/models openvino/model_server "
    "--port 9000 --config_path /models/config.json",
}


def _parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``image=3x224x224`` -> ("image", (3, 224, 224)). Raises UsageError."""
    name, value = ui.pair(text, "--shape", "image=3x224x224")
    sizes = value.replace(",", "x").split("x")
    if not all(size.isdecimal() for size in sizes):
        raise UsageError(f"--shape {text!r} is not NAME=SIZE", "give --shape image=3x224x224, for example")
    return name, tuple(map(int, sizes))


@ui.options_of(ExportOptions, shape=_parse_shape)
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="module:function that returns any torch module with example inputs, FILE.onnx, "
            "a Hugging Face directory, owner/name on the hub, deepmind:TASK:FILE or preset:NAME.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="BUNDLE", help="Where to write the bundle.")],
    options: ExportOptions,
) -> None:
    """Export a model to a bundle: trace, fold, compare with PyTorch, write.

    The bundle is written only if the graph reproduces PyTorch's outputs.
    """
    from perceiver_export.exporter.pipeline import export as export_

    with ui.progress_bar("export") as progress:
        bundle = export_(source, output, options, progress=progress)
    ui.print_json({"bundle": str(bundle.path), "manifest": bundle.manifest})
    bundle.path = Path(output)  # as it was typed
    if ui.shows_text():
        _show_export(bundle)


def _show_export(bundle: Bundle) -> None:
    """The files, the assumptions, and the commands to type next."""
    manifest = bundle.manifest
    source = "the ONNX file" if manifest.source.endswith(".onnx") else "torch"
    worst = max(manifest.verification, key=lambda check: check.difference)
    ui.say(f"exported {manifest.source} to {bundle.path} ({ui.mebibytes(bundle.num_bytes)})")
    for name, part in manifest.parts.items():
        if bundle.split:
            ui.say(f"part {name}")
        for spec in (*part.inputs, *part.outputs):
            ui.say(f"  {ui.described(spec, manifest.output_kinds)}")
        ui.say(f"  {_work(part)}")
    ui.say(
        f"  verified against {source} in {len(manifest.verification)} comparisons: largest difference "
        f"{worst.difference:.1e} of the output's scale ({worst.tolerance:.0e} allowed)"
    )
    for note in manifest.notes:
        ui.say(note, "note:")
    path = shlex.quote(str(bundle.path))
    if advice := advice_here(bundle):
        ui.say(advice, "note:")
    ui.show_written(bundle.path)
    ui.say(f"perceiver-export run {path} {example_input(manifest)}", "next:")
    int8 = shlex.quote(f"{bundle.path}-int8")
    ui.say(f"perceiver-export quantize {path} --data DATA -o {int8}", "next:")


def _work(part: Part) -> str:
    """FLOPs and weights of a part, and how many of its matrix products are folded."""
    folded = sum(one.chosen == "folded" for one in part.folds)
    folds = f", {folded} of {len(part.folds)} matrix products folded" if part.folds else ""
    each = "sample" if part.num_queries is None else "call"
    flops, weights = (sum(getattr(one, name) for one in part.stages) for name in ("flops", "parameters"))
    return f"work: {ui.count(flops)}FLOP a {each}, {ui.count(weights).strip()} weights in the graph{folds}"


def presets() -> None:
    """List the papers' models; `export preset:NAME` builds one with random weights, to size a device."""
    from perceiver_export.exporter.presets import PRESETS

    ui.print_json({name: _preset_document(preset) for name, preset in PRESETS.items()})
    remarks = (f"{name}: {_remark(preset)}" for name, preset in PRESETS.items() if _remark(preset))
    ui.print_table(
        "the papers' models, to export as preset:NAME",
        ["preset\n  task", "inputs\nlatents", "parameters\npaper>", "FLOPs\npaper>"],
        [_preset_row(name, preset) for name, preset in PRESETS.items()],
        "\n".join([_PRESETS_NOTE, *remarks]),
    )


def _preset_document(preset: Preset) -> dict[str, Any]:
    paper = {"reference": preset.reference, "parameters": preset.parameters, "flops": preset.flops}
    own = {"remark": preset.remark, "architecture": preset.build("deepmind")}
    return {"task": preset.task, **preset.counts._asdict(), "paper": paper, **own}


def _preset_row(name: str, preset: Preset) -> list[str]:
    """Cells of one preset, with the paper's figures below ours."""
    config = preset.build("deepmind")
    sizes = [f"{name} {_size(one)}" for name, one in config.inputs.items() if _size(one)]
    latents = f"latents {config.encoder.num_latents}×{config.encoder.num_latent_channels}"
    pairs = ((preset.counts.parameters, preset.parameters), (preset.counts.flops, preset.flops))
    return [f"{name}\n  {preset.task}", "\n".join([*sizes, latents]), *(_compared(*one) for one in pairs)]


def _remark(preset: Preset) -> str:
    if preset.task not in ("fill-mask", "arrays"):
        return preset.remark
    power, unit = ui.unit(preset.counts.flops_of_one_query)
    return f"{preset.remark} One query: {preset.counts.flops_of_one_query / power:.4g} {unit}FLOP."


def _size(one: Input) -> str:
    """3×224×224; empty for an input that is not given."""
    from perceiver_export.exporter.model.config import ArrayInput, FramePairInput, ImageInput, TokenInput

    shape: tuple[int, ...] = ()
    if isinstance(one, ImageInput):
        shape = (one.num_channels, one.height, one.width)
    elif isinstance(one, FramePairInput):
        shape = (2, 3, one.height, one.width)
    elif isinstance(one, TokenInput):
        shape = (one.length,)
    elif isinstance(one, ArrayInput):
        shape = (*one.shape, one.num_channels)
    return "×".join(map(str, shape))


def _compared(ours: float, paper: float | None) -> str:
    """62.26 M; below it the paper's number in the same unit, and our difference from it."""
    power, unit = ui.unit(ours)
    there = "" if paper is None else f"\n{paper / power:.4g} {unit}\n{ours / paper - 1:+.1%}"
    return f"{ours / power:.4g} {unit}{there}"


def inspect(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL.onnx", help="A bundle, or an ONNX file.")],
    layers: Annotated[bool, typer.Option("--layers", help="Show each stage, fold and layer with its costs.")] = False,
) -> None:
    """Describe a bundle: inputs, outputs, work, precision and certificates; --layers shows each stage."""
    from perceiver_export.exporter.describe import inspect_bundle

    found = inspect_bundle(bundle)
    document = {**vars(found), "path": str(found.path), "bytes": found.bytes_on_disk}
    del document["bytes_on_disk"]
    ui.print_json(document)
    _show_inspection(found, layers)


def _show_inspection(inspection: Inspection, layers: bool) -> None:
    """Print a summary, and with ``layers`` tables of each part."""
    manifest = inspection.manifest
    if manifest is not None:
        kind = f"{manifest.task}, {manifest.precision}, {manifest.parity} numerics"
        ui.say(f"{manifest.name}: {kind}, from {manifest.source}")
        if manifest.labels:
            more = ", …" if len(manifest.labels) > 5 else ""
            ui.say(f"labels: {len(manifest.labels)} ({', '.join(map(printable, manifest.labels[:5]))}{more})")
        for note in manifest.notes:
            ui.say(note, "note:")
    ui.say(f"on disk: {ui.mebibytes(inspection.bytes_on_disk)}")
    for name, part in inspection.parts.items():
        if len(inspection.parts) > 1:
            ui.say(f"part {name}")
        for what, specs in (("input", part.inputs), ("output", part.outputs)):
            for spec in specs:
                ui.say(f"{what} {ui.described(spec, {} if manifest is None else manifest.output_kinds)}")
        ui.say(_work(part))
    if inspection.calibration is not None:
        _show_precision(inspection.calibration, layers)
    held = {"": inspection.certificates, **inspection.certified_with}
    for options, certificates in held.items():
        for certificate in certificates:
            ui.say(f"certified, valid here{f' with {options}' if options else ''}: {certificate}")
    for place in inspection.certified_elsewhere:
        ui.say(f"certified elsewhere, not valid here: {place}")
    if layers:
        from perceiver_export.calibration.report.tables import part_tables

        for name, part in inspection.parts.items():
            for table in part_tables(name, part):
                ui.say("")
                ui.print_table(table.title, table.columns, table.rows, table.note)
    else:
        ui.say(f"perceiver-export inspect {shlex.quote(str(inspection.path))} --layers", "details:")


def _show_precision(calibration: Calibration, layers: bool) -> None:
    """Print how it was quantized, the integer kernels of each engine, and the float layers; see also `profile`."""
    data = calibration.data
    ui.say(f"{calibration.how}, calibrated on {data.samples:,} samples of {data.source}")
    for gate in calibration.gates:
        ui.say(f"on the calibration data, {gate}")
    for name, part in calibration.parts.items():
        for one in part.coverage:
            ui.say(f"{name} on {one.engine}: {one.share:.2%} of int8 multiply-adds in integer kernels")
    if not layers:
        return
    ui.say(f"fingerprint of the data: {data.fingerprint}")
    ui.say(f"quantized by policy: {calibration.policy}")
    for part in calibration.parts.values():
        for excluded in part.excluded:
            ui.say(f"float: {excluded.name} ({excluded.share:.1%} of the work): {excluded.reason}")
        for hazard in part.hazards:
            ui.say(f"too large for fp16: {hazard.name}, up to {hazard.largest:.3g}, sums of {hazard.depth:,}")


def package(
    bundle: ui.BundleArgument,
    server: Annotated[str, typer.Option("--for", metavar="triton|ovms", help="The inference server.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where to write the repository; by default BUNDLE-SERVER.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Target on the server: ort-cpu, ort-cuda, openvino-cpu, -gpu or -npu.")
    ] = None,
) -> None:
    """Write a model repository for an inference server, configured from the figures of `bench --save`."""
    from perceiver_export.exporter.serving import package as package_

    path = package_(bundle, server, output, target=target)
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    ui.print_json({"path": str(path), "files": list(map(str, files))})
    ui.say(f"{path} is a model repository for {server}:")
    for file in files:
        ui.say(f"  {file} ({ui.mebibytes((path / file).stat().st_size)})")
    ui.show_written(path)
    ui.say(_NEXT[server].format(path=shlex.quote(str(path.absolute()))), "next:")
