# SPDX-License-Identifier: Apache-2.0
"""Labels in DATA, as the output that they judge wants them; and what is said of the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration.data.fingerprints import DataWatch
from perceiver_export.calibration.data.samples import Example, Samples, digest_of
from perceiver_export.calibration.data.sources import Labels
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.manifest import OutputKind
from perceiver_export.runtimes.runtime import Array
from tests.calibration.manifests import flow, images, judged, sets

MOODS = ("bad", "good", "so; so")
ROWS = np.zeros((2, 4), np.float32)


def labels_of(kind: OutputKind, names: tuple[str, ...] = MOODS, size: int = 3) -> Labels:
    return Labels(judged(kind, names, size))


READ: list[tuple[OutputKind, tuple[str, ...], int, list[Any], Any]] = [
    ("single-label", MOODS, 3, ["good", 1, np.int64(1), np.array(1), 1.0, "1", True], 1),
    ("single-label", (), 3, [2, "2"], 2),
    ("single-label", ("crane", "dog", "crane"), 3, [2, "2"], 2),
    ("single-label", ("1", "2", "3"), 3, ["2", 1], 1),  # text is a name, an integer is an index
    ("single-label", ("0", "1", "2"), 3, ["1", 1], 1),
    ("multi-label", MOODS, 3, [1, "good", np.array(["good"])], [0, 1, 0]),
    ("multi-label", MOODS, 3, ["so; so", [0, 0, 1]], [0, 0, 1]),
    ("multi-label", MOODS, 3, ["bad; good"], [1, 1, 0]),
    ("multi-label", MOODS, 3, ["", [], np.zeros(3)], [0, 0, 0]),
    ("multi-label", MOODS, 3, ["0;2", ["bad", 2], [2, 0], [1.0, 0.0, 1.0]], [1, 0, 1]),
    ("multi-label", MOODS, 3, [[True, False, True], np.array([1, 0, 1])], [1, 0, 1]),
    ("multi-label", MOODS, 3, [np.array([2, 1])], [0, 1, 1]),
    ("multi-label", MOODS[:2], 2, [[False, True], np.array([0, 1]), ["good"], [1]], [0, 1]),
    ("regression", (), 1, [2, "2", np.array([2.0])], [2]),
    ("regression", (), 2, [[1, 2.5], "1;2.5"], [1, 2.5]),
]
REFUSED: list[tuple[OutputKind, tuple[str, ...], int, list[Any]]] = [
    # A fraction that is cut to a number would make a right answer of a wrong one.
    ("single-label", MOODS, 3, [3, -1, 0.6, "ugly", "3", None, np.arange(2), ["good"]]),
    ("single-label", (), 3, [3]),
    ("single-label", ("crane", "dog", "crane"), 3, ["crane"]),
    ("single-label", ("1", "2", "3"), 3, ["0"]),
    ("multi-label", MOODS, 3, [3, "ugly", "bad;ugly", [0.5], [0.2, 0.8, 1.0], ["good", 7], np.zeros((3, 3)), None]),
    ("multi-label", MOODS[:2], 2, [[0, 1]]),  # indices, or zeros and ones
    ("regression", (), 1, ["tall", None, [1, 2], np.nan, "inf", 1e300, [[1]], {}]),
]


@pytest.mark.parametrize(("kind", "names", "size", "given", "expected"), READ)
def test_labels(kind: OutputKind, names: tuple[str, ...], size: int, given: list[Any], expected: Any) -> None:
    labels = labels_of(kind, names, size)
    for target in (labels.read(label, "here") for label in given):
        assert target.tolist() == expected
        assert target.dtype == (np.int64 if kind == "single-label" else np.float32)
        if kind != "single-label":
            said = [name for name, found in zip(names, expected, strict=False) if found]
            assert labels.seen(target) == said


@pytest.mark.parametrize(("kind", "names", "size", "given"), REFUSED)
def test_what_is_no_label_is_refused(kind: OutputKind, names: tuple[str, ...], size: int, given: list[Any]) -> None:
    for label in given:
        with pytest.raises(DataError, match="here: "):
            labels_of(kind, names, size).read(label, "here")


def test_names_that_are_shared_or_numbers_are_told_apart() -> None:
    cranes = labels_of("single-label", ("crane", "dog", "crane"))
    assert [cranes.seen(np.array(index)) for index in range(3)] == [["crane (0)"], ["dog"], ["crane (2)"]]
    numbers, digits = labels_of("single-label", ("1", "2", "3")), labels_of("single-label", ("0", "1", "2"))
    for label in ("1", "3", 1, 0):
        numbers.read(label, "here")
    assert numbers.notes.keys() == {"text", "an integer"}
    assert "'1' is label 0, named '1'" in numbers.notes["text"]
    assert "1 is label 1, named '2'" in numbers.notes["an integer"]
    digits.read("1", "here")  # each is its own index: nothing to confuse
    assert digits.notes == {}


def test_labels_that_judge_nothing_are_any_array() -> None:
    given: list[Any] = [[[1.5, 2]], "word", [[1], [1, 2]], None]
    rows = [{"x": ROWS[0], "labels": label} for label in given]
    found = [example.targets for example in Samples(rows, judged("none", (), 3), judged=True).stream]

    assert [target["label"].tolist() for target in found[:2]] == given[:2]
    assert found[2:] == [{}, {}]  # no array at all


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("single-label", [2, 0], [2, 0]),
        ("multi-label", [[0, 1, 1], [1, 0, 0]], [[0, 1, 1], [1, 0, 0]]),
        ("multi-label", ["good", "bad;so"], [[0, 1, 0], [1, 0, 1]]),
        ("regression", [[1.5, 2, 3], [4, 5, 6]], [[1.5, 2, 3], [4, 5, 6]]),
    ],
)
def test_archives_hold_labels_of_every_kind(kind: OutputKind, given: Any, expected: Any, tmp_path: Path) -> None:
    names = ("bad", "good", "so")
    np.savez(tmp_path / "data.npz", x=ROWS, labels=np.array(given))
    found = list(Samples(tmp_path / "data.npz", judged(kind, names, 3), judged=True).stream)

    assert np.stack([example.targets["label"] for example in found]).tolist() == expected


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
