# SPDX-License-Identifier: Apache-2.0
"""The accuracy table of int8: the trained Fashion-MNIST and byte-level text models, on both engines.

    python -m tests.benchmarks.int8_accuracy [--images 10000] [--only text]

Fashion-MNIST: calibrated on the 2,000 held-out training images, measured on 10,000 test images. Text: calibrated on
512 pieces of verses that were held out of training, measured on 2,500 others, with bounds (low, high). Noise compares
an engine with itself after normal noise of 1e-6 and 1e-5 was added to the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from scipy import stats

from perceiver_export.calibration import QuantizeOptions, quantize, validate
from perceiver_export.calibration.graphs import sqnr
from perceiver_export.calibration.quantization.options import Scheme
from perceiver_export.exporter import export
from perceiver_export.runtimes import Bundle, load, open_task
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.engines.openvino import precisions
from perceiver_export.runtimes.runtime import Array, Feeds
from tests.benchmarks.harness import REPOSITORY, Row, command
from tests.calibration.asked import asked

Runner = Callable[[Feeds], Mapping[str, Array]]
SCHEMES: tuple[Scheme, ...] = ("int8", "int8-weights", "int4-weights")
ENGINES: tuple[tuple[str, Precision | None], ...]
ENGINES = (("ort-cpu", None), ("openvino-cpu", None), ("openvino-cpu", "bf16"))  # bf16 where the CPU has it, with int8


def measure(work: Path, images: int = 10_000, only: str = "fashion_mnist, text_bytes") -> Iterator[Row]:
    if "fashion" in only:
        yield from fashion(made("fashion_mnist", "held_out.npz", 2000, work), images)
    if "text" in only:
        yield from text(made("text_bytes", "calibration.jsonl", 512, work))


def made(example: str, data: str, samples: int, work: Path) -> dict[str, Bundle]:
    """The example's bundle in fp32 and in every scheme."""
    folder = REPOSITORY / "examples" / example
    fp32 = export(folder / "checkpoint", work / example)
    return {"fp32": fp32} | {
        scheme: quantize(
            fp32, folder / data, work / f"{example}-{scheme}", QuantizeOptions(scheme=scheme, samples=samples)
        )
        for scheme in SCHEMES
    }


def combinations(schemes: Iterable[str]) -> Iterator[tuple[str, str, str, Precision | None]]:
    """Row, scheme, target and precision."""
    for scheme in schemes:
        for target, precision in ENGINES:
            if precision is None or (scheme == "int8" and precision in precisions(target)):
                yield " ".join(filter(None, (scheme, target, precision))), scheme, target, precision


def fashion(bundles: dict[str, Bundle], count: int) -> Iterator[Row]:
    """Every scheme on every engine, compared with fp32 on ONNX Runtime."""
    folder = REPOSITORY / "examples" / "fashion_mnist"
    with open_task(bundles["fp32"]) as task, np.load(folder / "test.npz") as archive:
        truth = archive["labels"][:count]
        images = [task.preprocess(image)[None] for image in archive["image"][:count]]
    run = partial(logits_of, images)
    logits = {
        name: run(load(bundles[scheme], target, precision=precision).run)
        for name, scheme, target, precision in combinations(bundles)
    }
    exact, best = logits["fp32 ort-cpu"], {name: found.argmax(1) for name, found in logits.items()}
    for name, found in logits.items():
        same = stats.binomtest(int((best[name] == best["fp32 ort-cpu"]).sum()), count)
        top1, reference = (100 * float((best[side] == truth).mean()) for side in (name, "fp32 ort-cpu"))
        yield {
            "fashion-mnist": name,
            "top-1": top1,
            "drop in points": reference - top1,
            "agreement with fp32": 100 * same.statistic,
            "its lower 95 % bound": 100 * same.proportion_ci(0.95, method="exact").low,
            "SQNR against fp32, dB": sqnr(exact, found),
        }
    here, there = logits["int8 ort-cpu"], logits["int8 openvino-cpu"]
    runner = load(bundles["int8"], "ort-cpu").run
    yield {
        "int8": "ONNX Runtime against OpenVINO",
        "agreement": 100 * float((here.argmax(1) == there.argmax(1)).mean()),
        "SQNR, dB": sqnr(here, there),
        "ONNX Runtime's own noise, dB": {f"{noise:g}": sqnr(here, run(runner, noise)) for noise in (1e-6, 1e-5)},
    }


def logits_of(images: list[Array], runner: Runner, noise: float = 0.0) -> Array:
    generator = np.random.default_rng(0)
    rows = []
    for image in images:
        moved = image + np.float32(noise) * generator.normal(size=image.shape).astype(np.float32) if noise else image
        rows.append(runner({"image": moved})["logits"])
    return np.concatenate(rows)


def text(bundles: dict[str, Bundle]) -> Iterator[Row]:
    """`validate`'s own metrics: 15 % of the bytes of held-out verses are masked and filled."""
    fp32 = bundles.pop("fp32")
    for name, scheme, target, precision in combinations(bundles):
        options = asked(against=fp32, device=target, against_device="ort-cpu", precision=precision)
        found = validate(bundles[scheme], REPOSITORY / "examples" / "text_bytes" / "test.jsonl", options)
        both = {one.name: {"found": one.candidate, "worse by": one.worsening} for one in found.metrics}
        known = {name: {key: one for key, one in pair.items() if one is not None} for name, pair in both.items()}
        yield {"text bytes": name, **msgspec.to_builtins(known)}


if __name__ == "__main__":
    command(measure)
