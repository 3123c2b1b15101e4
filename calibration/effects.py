# SPDX-License-Identifier: Apache-2.0
"""What quantization does to a bundle's outputs, and to its speed on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.observe import Call
from perceiver_export.calibration.plan import decibels
from perceiver_export.calibration.record import OutputEffect, Speed
from perceiver_export.calibration.sessions import open_session
from perceiver_export.runtimes.errors import GateError
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.runtime import Array, Feeds

_SCORES = ("logits", "label")
_ROUNDS, _SECONDS = 7, 30.0  # of timing, whichever ends first

Runner = Callable[[Feeds], Mapping[str, Array]]


def output_effects(
    manifest: Manifest, runners: Mapping[str, Runner], calls: Sequence[Call]
) -> tuple[OutputEffect, ...]:
    """SQNR and agreement of every output with fp32. Decoders get the quantized encoder's latents."""
    found: dict[str, list[Array]] = {}
    exact: dict[str, list[Array]] = {}
    for call in calls:
        latents: dict[str, Array] = {}
        for name in manifest.parts:
            feeds = {**call.feeds[name], **({"latents": latents["latents"]} if "latents" in call.feeds[name] else {})}
            outputs = runners[name](feeds)
            if name == "encoder":
                latents = dict(outputs)
            for output, values in call.outputs[name].items():
                found.setdefault(output, []).append(np.asarray(outputs[output]))
                exact.setdefault(output, []).append(values)
    return tuple(_effect(name, np.concatenate(exact[name]), np.concatenate(found[name])) for name in exact)


def _effect(name: str, exact: Array, found: Array) -> OutputEffect:
    agreement = float((exact.argmax(-1) == found.argmax(-1)).mean()) if name in _SCORES else None
    return OutputEffect(name, decibels(exact, found), agreement)


def ort_runner(path: Path, threads: int | None = None, in_order: bool = False) -> Runner:
    """A graph on ONNX Runtime; ``in_order`` (`open_session`) takes less memory and is not what an app runs."""
    session = open_session(ir.load(path), path.parent, threads, in_order=in_order)
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, dict(feeds)), strict=True))


def openvino_runner(path: Path, threads: int | None = None) -> Runner:
    """A graph on OpenVINO, float32 where it is not int8 (its own default is bfloat16 where the CPU has that)."""
    import openvino

    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    request = openvino.Core().compile_model(str(path), "CPU", config).create_infer_request()

    def run(feeds: Feeds) -> dict[str, Array]:
        results = request.infer(dict(feeds))
        return {output.get_any_name(): values.copy() for output, values in results.items()}

    return run


RUNNERS = {"ort-cpu": ort_runner, "openvino-cpu": openvino_runner}


def measure_speed(
    target: str, fp32: Mapping[str, Path], quantized: Mapping[str, Path], call: Call, threads: int | None
) -> Speed:
    """Median time of a call of all parts, fp32 and quantized in turn in the same seconds.

    Raises GateError where a quantized part gives NaN or infinite values: engines have kernels that do.
    """
    sides = [{name: RUNNERS[target](path, threads) for name, path in graphs.items()} for graphs in (fp32, quantized)]
    times: tuple[list[float], list[float]] = ([], [])
    for name, runner in sides[1].items():
        _require_finite(runner(call.feeds[name]), target)
    start = time.perf_counter()
    for number in range(_ROUNDS + 1):
        for runners, taken in zip(sides, times, strict=True):
            begin = time.perf_counter()
            for name, runner in runners.items():
                runner(call.feeds[name])
            if number:  # the first finds cold caches
                taken.append((time.perf_counter() - begin) * 1e3)
        if number and time.perf_counter() - start > _SECONDS:
            break
    return Speed(target, float(np.median(times[0])), float(np.median(times[1])))


def _require_finite(outputs: Mapping[str, Array], target: str) -> None:
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise GateError(
                f"the quantized model's {name!r} holds NaN or infinite values on {target}",
                "fp32 gives none: try another --scheme, or --keep-float for some layers",
            )
