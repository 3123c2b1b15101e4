# SPDX-License-Identifier: Apache-2.0
"""The accuracy table of int8: the trained Fashion-MNIST and byte-level text models, on both engines.

    python tests/benchmarks/int8_accuracy.py [--pictures 10000] [--only text] [--json FILE]

Fashion-MNIST: calibrated on the 2,000 held-out training pictures, measured on 10,000 test pictures. Text: calibrated
on 512 pieces of verses that were held out of training, measured on 2,500 others, with bounds (low, high). Noise is
what one engine gives for inputs moved by normal numbers of 1e-6.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from perceiver_export.calibration import quantize, validate
from perceiver_export.calibration.effects import Runner
from perceiver_export.calibration.plan import Scheme, decibels
from perceiver_export.calibration.statistics import proportion
from perceiver_export.exporter import export
from perceiver_export.runtimes import Bundle, load, open_task
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.runtime import Array

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCHEMES: tuple[Scheme, ...] = ("int8", "int8-weights", "int4-weights")
# The last computes in bf16 what is not int8: one row of it is enough.
ENGINES: tuple[tuple[str, Precision | None], ...]
ENGINES = (("ort-cpu", None), ("openvino-cpu", None), ("openvino-cpu", "bf16"))


def combinations(schemes: Iterable[str]) -> Iterator[tuple[str, str, str, Precision | None]]:
    """Row, scheme, target and precision of what is measured."""
    for scheme in schemes:
        for target, precision in ENGINES:
            if precision is None or scheme == "int8":
                yield " ".join(filter(None, (scheme, target, precision))), scheme, target, precision


def row(found: Array, exact: Array, hit: Callable[[Array], Array], logits: tuple[Array, Array]) -> dict[str, Any]:
    """Top-1 drop in points, agreement with its lower bound in percent, SQNR in dB."""
    same = proportion(int((found == exact).sum()), len(found))
    return {
        "top-1": 100 * float(hit(found).mean()),
        "drop in points": 100 * float(hit(exact).mean() - hit(found).mean()),
        "agreement with fp32": 100 * same.value,
        "its lower 95 % bound": 100 * same.low,
        "SQNR against fp32, dB": decibels(logits[1], logits[0]),
    }


def measure(bundles: dict[str, Bundle], run: Callable[[Runner, float], Array], truth: Array) -> dict[str, Any]:
    """Every scheme on every engine; ``run(runner, noise)`` gives logits (n, classes) for ``truth`` (n)."""
    logits = {
        name: run(load(bundles[scheme], target, precision=precision).run, 0.0)
        for name, scheme, target, precision in combinations(bundles)
    }
    reference = logits["fp32 ort-cpu"]
    rows: dict[str, Any] = {
        name: row(found.argmax(1), reference.argmax(1), lambda best: best == truth, (found, reference))
        for name, found in logits.items()
    }
    here, there = logits["int8 ort-cpu"], logits["int8 openvino-cpu"]
    rows["int8: ONNX Runtime against OpenVINO"] = {
        "agreement": 100 * float((here.argmax(1) == there.argmax(1)).mean()),
        "SQNR, dB": decibels(here, there),
    }
    return rows


def own_noise(rows: dict[str, Any], bundle: Bundle, run: Callable[[Runner, float], Array]) -> None:
    """Add what inputs moved by 1e-6 and 1e-5 do to one engine."""
    runner = load(bundle, "ort-cpu").run
    still = run(runner, 0.0)
    for size in (1e-6, 1e-5):
        rows["int8: ONNX Runtime against OpenVINO"][f"ONNX Runtime's own noise at {size:g}, dB"] = decibels(
            still, run(runner, size)
        )


def fashion(work: Path, count: int) -> dict[str, Any]:
    """The rows of the picture model."""
    folder = EXAMPLES / "fashion_mnist"
    bundles = {"fp32": export(folder / "checkpoint", work / "fashion")}
    for scheme in SCHEMES:
        out = work / f"fashion-{scheme}"
        bundles[scheme] = quantize(bundles["fp32"], folder / "held_out.npz", out, scheme=scheme, samples=2000)
    with open_task(bundles["fp32"]) as task, np.load(folder / "test.npz") as archive:
        truth = archive["labels"][:count]
        pictures = [task.preprocess(picture)[None] for picture in archive["image"][:count]]

    def run(runner: Runner, noise: float) -> Array:
        generator = np.random.default_rng(0)
        moved = (p + np.float32(noise) * generator.normal(size=p.shape).astype(np.float32) for p in pictures)
        return np.concatenate([runner({"image": p})["logits"] for p in (moved if noise else pictures)])

    rows = measure(bundles, run, truth)
    own_noise(rows, bundles["int8"], run)
    return rows


def text(work: Path) -> dict[str, Any]:
    """The text model by `validate`'s own metrics: 15 % of the bytes of held-out verses are masked and filled."""
    folder = EXAMPLES / "text_bytes"
    fp32 = export(folder / "checkpoint", work / "text")
    rows: dict[str, Any] = {}
    bundles: dict[str, Bundle] = {
        scheme: quantize(fp32, folder / "calibration.jsonl", work / f"text-{scheme}", scheme=scheme, samples=512)
        for scheme in SCHEMES
    }
    for name, scheme, target, precision in combinations(bundles):
        made, data = bundles[scheme], folder / "test.jsonl"
        found = validate(made, data, against=fp32, device=target, against_device="ort-cpu", precision=precision)
        rows[name] = {
            result.name: msgspec.to_builtins({"found": result.candidate, "worse by": result.worsening})
            for result in found.metrics
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--only", choices=("fashion-mnist", "text"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = {}
        if arguments.only != "text":
            results["fashion-mnist"] = fashion(Path(directory), arguments.pictures)
        if arguments.only != "fashion-mnist":
            results["text bytes"] = text(Path(directory))
    print(json.dumps(results, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
