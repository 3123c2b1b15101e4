# SPDX-License-Identifier: Apache-2.0
"""What is said of the samples that a bundle was calibrated on."""

from __future__ import annotations

import numpy as np

from perceiver_export.calibration.data.fingerprints import DataWatch
from perceiver_export.calibration.data.samples import Example, Samples, digest_of
from perceiver_export.runtimes.runtime import Array
from tests.calibration.manifests import flow, images, sets


def example(image: Array, label: str) -> Example:
    return Example(label, {"image": image}, {}, labels=(label,), digest=digest_of({"image": image}))


def test_fingerprints_know_samples_whatever_their_order() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 3, 28, 28)).clip(-2, 2).astype(np.float32)
    examples = [example(row, "cat" if number % 2 else "dog") for number, row in enumerate(rows)]
    forwards, backwards, fewer = (DataWatch(images, "x") for _ in range(3))
    for one in examples:
        forwards.see(one)
    for one in reversed(examples):
        backwards.see(one)
    for one in examples[1:]:
        fewer.see(one)

    assert forwards.report().fingerprint == backwards.report().fingerprint != fewer.report().fingerprint
    assert len(set(forwards.digests)) == 40
    assert forwards.report().warnings == ()


def test_doubtful_data_is_told() -> None:
    watch = DataWatch(images, "random")
    for _ in range(3):
        watch.see(example(np.full((3, 28, 28), 255.0, np.float32), "cat"))
    warnings = " | ".join(watch.report(["names are numbers"]).warnings)

    for told in (
        "random numbers",
        "3 samples",
        "2 of 3 samples are repeated",
        "same label, 'cat'",
        "same in all",
        "255 … 255",
        "names are numbers",
    ):
        assert told in warnings


def test_arrays_that_nothing_reads_are_told() -> None:
    """A misspelt target, say; what `validate` reads is expected, and metrics of one's own read any array."""
    frames, truth = np.zeros((2, 3, 16, 24), np.float32), np.zeros((16, 24, 2), np.float32)
    entities = np.ones((12, 16), np.float32)
    for model, sample, expected in (
        (flow, {"frames": frames, "flwo": truth}, True),
        (flow, {"frames": frames, "flow": truth}, False),
        (sets, {"entities": entities, "wanted": np.zeros(3)}, False),
    ):
        watch = DataWatch(model, "x")
        watch.see(next(Samples([sample], model).stream))
        assert any("'flwo'" in warning for warning in watch.report().warnings) == expected
