# SPDX-License-Identifier: Apache-2.0
"""Calibration data that looks right and is not: refused with the sample's name, before anything is written."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import measure_sensitivity, quantize
from perceiver_export.calibration.collect import Observer
from perceiver_export.calibration.data import open_data
from perceiver_export.calibration.examples import open_examples
from perceiver_export.calibration.feeds import open_feeds
from perceiver_export.calibration.labels import label_index
from perceiver_export.exporter import export
from perceiver_export.exporter.perceiver import architectures
from perceiver_export.exporter.perceiver.config import TokenInput
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.bundle import read_manifest
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.manifest import Manifest
from tests.calibration.graphs import build, save
from tests.cli import small_models
from tests.cli.commands import fail
from tests.conftest import FASHION

TEXT = FASHION.parent / "text_bytes"


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(TEXT / "checkpoint", tmp_path_factory.mktemp("text") / "text").path


@pytest.fixture(scope="module")
def texts(text_bundle: Path) -> Manifest:
    from perceiver_export.runtimes import open_bundle

    return open_bundle(text_bundle).manifest


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small_models.sentiment(), tmp_path_factory.mktemp("sentiment") / "sentiment").path


def as_quantize(bundle: Path, data: Path) -> Any:
    (example,) = open_feeds(data, read_manifest(bundle)).stream
    return example.label


def as_validate(bundle: Path, data: Path) -> Any:
    with open_task(bundle) as task:
        (example,) = open_examples(task, data).stream
    return example.targets["label"]


def arrays_with(label: Any, folder: Path) -> Path:
    """One sample of tokens."""
    np.savez(folder / "data.npz", tokens=np.full((1, 32), 70, np.int32), label=np.array([label]))
    return folder / "data.npz"


@pytest.fixture(scope="module")
def pictures(fashion_bundle: Path) -> Manifest:
    from perceiver_export.runtimes import open_bundle

    return open_bundle(fashion_bundle).manifest


@pytest.mark.parametrize("token", [262, -5])
def test_tokens_that_the_model_does_not_know_are_refused(text_bundle: Path, tmp_path: Path, token: int) -> None:
    """Of a negative one the engine would take a row from the table's end, and say nothing."""
    data = tmp_path / "tokens.npz"
    np.savez(data, tokens=np.full((2, 64), token, np.int32), tokens_mask=np.ones((2, 64), np.int32))

    said = fail("quantize", text_bundle, "--data", data, "-o", tmp_path / "out")

    assert f"tokens.npz[0]: 'tokens' holds token {token}" in said
    assert not (tmp_path / "out").exists()


def test_numbers_that_do_not_fit_the_models_type_are_refused(texts: Manifest, pictures: Manifest) -> None:
    large = {"tokens": np.full(64, 2**32 + 7), "tokens_mask": np.ones(64, np.int32)}
    with pytest.raises(DataError, match="numbers that do not fit int32"):
        list(open_feeds([large], texts).stream)
    with pytest.raises(DataError, match="NaN or infinite values as float32"):
        list(open_feeds([{"image": np.full((3, 28, 28), 1e300)}], pictures).stream)


def test_numbers_of_another_width_are_read_alike(sentiment: Path, texts: Manifest, tmp_path: Path) -> None:
    """`validate` cut 2**32 + 7 to token 7, and refused float64, which `quantize` takes."""
    np.savez(tmp_path / "large.npz", tokens=np.full((1, 32), 2**32 + 7))
    with open_task(sentiment) as task:
        readers = (
            lambda data: list(open_examples(task, data).stream),
            lambda data: list(open_feeds(data, task.manifest).stream),
        )
        for read in readers:
            with pytest.raises(DataError, match=r"'tokens'.* holds numbers that do not fit int32"):
                read(tmp_path / "large.npz")

    points = export(small_models.points(), tmp_path / "points").path
    given = np.random.default_rng(0).normal(size=(1, 20, 3))
    for name, array in (("double", given), ("whole", np.ones((1, 20, 3), int)), ("huge", given * 1e300)):
        np.savez(tmp_path / f"{name}.npz", points=array)
    with open_task(points) as task:
        for open_ in (lambda data: open_examples(task, data), lambda data: open_feeds(data, task.manifest)):
            (example,) = open_(tmp_path / "double.npz").stream
            np.testing.assert_array_equal(example.feeds["points"], given[0].astype(np.float32))
            for name, said in (("whole", "is int64"), ("huge", "NaN or infinite values as float32")):
                with pytest.raises(DataError, match=said):
                    list(open_(tmp_path / f"{name}.npz").stream)


def test_a_function_may_call_a_pictures_label_labels(
    pictures: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import numpy\ndef samples(): yield {'image': numpy.zeros((28, 28), numpy.uint8), 'labels': 'Shirt'}\n"
    (tmp_path / "plural.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "plural", raising=False)

    (validated,) = open_data("plural:samples", pictures.labels).samples
    (calibrated,) = open_feeds("plural:samples", pictures).stream
    assert validated.label == calibrated.label == pictures.labels.index("Shirt")


def test_a_picture_that_cannot_be_prepared_is_named(fashion_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(fashion_bundle)
    pictures = np.zeros((3, 28, 28, 5), np.uint8)
    np.savez(tmp_path / "five.npz", image=pictures)
    (tmp_path / "text.png").write_text("no picture")

    with open_task(fashion_bundle) as task:
        for data, said in ((tmp_path / "five.npz", r"five.npz\[0\]: .*\[28, 28, 5\]"), (tmp_path, "text.png.*not a")):
            for stream in (open_examples(task, data).stream, open_feeds(data, manifest).stream):
                with pytest.raises(DataError, match=said):
                    list(stream)
            (tmp_path / "five.npz").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"the data\[0\]: a picture has shape"):
        list(open_feeds([{"image": pictures[0]}], manifest).stream)


def test_samples_without_a_label_have_none(pictures: Manifest) -> None:
    sample: dict[str, Any] = {"image": np.zeros((3, 28, 28), np.float32), "label": None}
    (example,) = open_feeds([sample], pictures).stream
    assert example.label is None


def test_an_axis_of_one_in_front_is_a_batch_to_both(sentiment: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(6, 262, (2, 1, 32))
    np.savez(tmp_path / "data.npz", tokens=tokens)
    np.savez(tmp_path / "two.npz", tokens=tokens.reshape(1, 2, 32))
    manifest = read_manifest(sentiment)

    with open_task(sentiment) as task:
        validated = [example.feeds for example in open_examples(task, tmp_path / "data.npz").stream]
        with pytest.raises(DataError, match=r"shape \[2, 32\]"):
            list(open_examples(task, tmp_path / "two.npz").stream)
    calibrated = [example.feeds for example in open_feeds(tmp_path / "data.npz", manifest).stream]
    with pytest.raises(DataError, match=r"int64 \[2, 32\]"):
        list(open_feeds(tmp_path / "two.npz", manifest).stream)

    for found in (validated, calibrated):
        np.testing.assert_array_equal(np.stack([one["tokens"] for one in found]), tokens[:, 0])


@pytest.mark.parametrize(
    ("label", "found"), [("good", 1), (1, 1), (np.int64(1), 1), (np.array(1), 1), (1.0, 1), ("1", 1), (True, 1)]
)
def test_labels_come_by_number_or_name(sentiment: Path, tmp_path: Path, label: Any, found: int) -> None:
    data = arrays_with(label, tmp_path)
    assert (as_quantize(sentiment, data), as_validate(sentiment, data)) == (found, found)


@pytest.mark.parametrize(
    ("label", "said"),
    [(2, "label 2 is out of range"), (-1, "label -1 is out"), (0.6, "0.6 is not a label"), ("ugly", "'ugly' is not")],
)
def test_labels_that_the_model_does_not_have_are_refused(
    sentiment: Path, tmp_path: Path, label: Any, said: str
) -> None:
    """By both alike: a fraction that is cut to a number makes a right answer of a wrong one."""
    data = arrays_with(label, tmp_path)
    for reader in (as_quantize, as_validate):
        with pytest.raises(DataError, match=said):
            reader(sentiment, data)
    with pytest.raises(DataError, match="is not a label"):
        label_index(np.arange(2), ("bad", "good"), "here")


def test_a_name_that_is_a_number_goes_before_the_number() -> None:
    assert [label_index(label, ("1", "0"), "here") for label in ("1", "0", 1, 0)] == [0, 1, 1, 0]


def test_random_tokens_are_tokens_that_the_model_knows(tmp_path: Path) -> None:
    """A vocabulary smaller than the papers' 262 bytes: what `quantize` draws itself, it must not refuse."""
    for known in (40, 3):
        config = architectures.text_classifier(TokenInput(known, 32, 24), small_models.ENCODER, 2, "deepmind")
        manifest = export(small_models.loaded(config, "arrays", None), tmp_path / str(known)).manifest
        drawn = [example.feeds["tokens"] for example in itertools.islice(open_feeds("random", manifest).stream, 20)]
        assert (np.min(drawn), np.max(drawn)) == (6 if known > 6 else 0, known - 1)


def test_pixels_of_frames_are_prepared_for_both(tmp_path: Path) -> None:
    bundle = export(small_models.flow(), tmp_path / "flow")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 24, 3)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", frames=pixels)
    np.savez(tmp_path / "batches.npz", frames=pixels[:, None])
    expected = np.moveaxis((pixels / 255.0 * 2.0 - 1.0).astype(np.float32), -1, 2)

    with open_task(bundle) as task:
        for data in (tmp_path / "data.npz", tmp_path / "batches.npz"):
            for stream in (open_examples(task, data).stream, open_feeds(data, task.manifest).stream):
                found = [example.feeds["frames"] for example in stream]
                np.testing.assert_array_equal(np.stack(found), expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails_at_once", r"failed: KeyError\('x'\)"),
        ("fails_later", "failed at sample 1: ZeroDivisionError"),
        ("leaves_at_once", r"failed: SystemExit\(0\)"),
        ("leaves_later", r"failed at sample 1: SystemExit\(0\)"),
        ("no_iterable", "gives no iterable"),
        ("not_there", "cannot be imported"),
    ],
)
def test_a_function_that_fails_is_one_error_for_all_who_call_it(
    name: str, said: str, sentiment: Path, pictures: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, sample in (
        ("texts_fail", "tokens=numpy.ones(32, int)"),
        ("pictures_fail", "image=numpy.zeros((9, 9))"),
    ):
        (tmp_path / f"{module}.py").write_text(
            "import numpy\n"
            "def fails_at_once(): raise KeyError('x')\n"
            f"def fails_later():\n    yield dict({sample})\n    1 / 0\n"
            "def leaves_at_once(): raise SystemExit(0)\n"
            f"def leaves_later():\n    yield dict({sample})\n    raise SystemExit(0)\n"
            "def no_iterable(): return 3\n"
        )
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)

    with open_task(sentiment) as task:
        streams: dict[str, list[Callable[[str], Iterable[Any]]]] = {
            "texts_fail": [
                lambda spec: open_examples(task, spec).stream,
                lambda spec: open_feeds(spec, task.manifest).stream,
            ],
            "pictures_fail": [lambda spec: open_data(spec, pictures.labels).samples],
        }
        for module, readers in streams.items():
            for read in readers:
                with pytest.raises(DataError, match=f"^{module}:{name} {said}"):
                    list(read(f"{module}:{name}"))
    assert sys.path == path


def test_a_script_that_ends_the_program_ends_no_command(
    fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`validate` ended with 0, as if its gates held."""
    (tmp_path / "script.py").write_text("import sys\ndef samples(): yield {}\nsys.exit(0)\n")
    (tmp_path / "metric.py").write_text("import sys\ndef leaves(outputs, targets): sys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    command: list[str | Path] = ["validate", fashion_bundle, "--against", fashion_bundle, "--samples", "2"]

    said = fail(*command, "--data", "script:samples", "--max-drop", "1")
    assert "script:samples cannot be imported: its module ends the program" in said
    own = ["--metric", "metric:leaves", "--max-metric-change", "1"]
    assert "metric:leaves failed: SystemExit: 0" in fail(*command, "--data", FASHION / "test.npz", *own)


def test_an_iterables_pixels_are_prepared_as_a_functions_are(pictures: Manifest) -> None:
    pixels = np.full((28, 28), 255, np.uint8)
    (example,) = open_feeds([{"image": pixels}], pictures).stream

    assert example.feeds["image"].shape == (3, 28, 28)
    assert example.feeds["image"].max() < 10


def test_lines_are_named_as_an_editor_counts_them(texts: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('\n\n{"text": "one\u2028line"}\n\n{"text": "' + "a" * 500 + '"}\n', encoding="utf-8")

    stream = open_feeds(path, texts).stream
    assert next(stream).name == "lines.jsonl, line 3"
    with pytest.raises(DataError, match=r"lines.jsonl, line 5: the text has 500 bytes"):
        next(stream)


def test_what_is_validated_on_can_be_calibrated_on(tmp_path: Path) -> None:
    """An .npz of frames and true flow serves `quantize --max-metric-change`, which both calibrates and validates."""
    manifest = export(small_models.flow(), tmp_path / "flow").manifest
    (spec,) = (one for one in manifest.parts["model"].inputs if one.name == "frames")
    shape = [int(size) for size in spec.shape[1:]]
    frames = np.zeros((2, *shape), np.float32)
    np.savez(tmp_path / "data.npz", frames=frames, flow=np.zeros((2, *shape[-2:], 2), np.float32))
    np.savez(tmp_path / "typo.npz", frames=frames, flwo=np.zeros(2))

    assert [set(example.feeds) for example in open_feeds(tmp_path / "data.npz", manifest).stream] == [{"frames"}] * 2
    with pytest.raises(DataError, match="'flwo', which the model does not take"):
        open_feeds(tmp_path / "typo.npz", manifest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": -3}, "threads is -3"),
        ({"max_drop": 1.0, "data": [{}]}, "data that can be read twice"),
        ({"max_drop": 1.0, "data": "random"}, "random numbers show no accuracy"),
        ({"max_drop": -1.0}, "--max-drop is -1"),
        ({"metric": "kl"}, "--metric has no effect without --max-metric-change"),
        ({"metric": "nonsense", "max_metric_change": 0.1}, "no metric 'nonsense'"),
    ],
)
def test_gates_that_cannot_be_held_are_refused_before_anything_runs(
    options: dict[str, Any], message: str, fashion_bundle: Path, tmp_path: Path
) -> None:
    ran: list[str] = []
    data = options.pop("data", FASHION / "held_out.npz")
    with pytest.raises(UsageError, match=message):
        quantize(fashion_bundle, data, tmp_path / "out", progress=lambda what, *_: ran.append(what), **options)
    assert ran == []
    assert not (tmp_path / "out").exists()


def test_sensitivity_refuses_the_same_threads(fashion_bundle: Path) -> None:
    with pytest.raises(UsageError, match="threads is 0"):
        measure_sensitivity(fashion_bundle, FASHION / "held_out.npz", threads=0)


@pytest.mark.parametrize("row", [0, 3, 5])
def test_nan_in_one_row_of_a_tensor_is_found(row: int, tmp_path: Path) -> None:
    """onnxruntime's reductions pass over a NaN that is not in the first row, so bounds alone do not show it."""
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    one (float[1, 6, 16] x, float[16, 16] w) => (float[1, 6, 16] y) { l = Log (x)  y = MatMul (l, w) }
    """
    model = build(text)
    observer = Observer(save(model, tmp_path), 1)
    rows = np.ones((1, 6, 16), np.float32)
    rows[0, row, 2] = -1.0

    observer.run({"x": np.ones_like(rows)})
    with pytest.raises(DataError, match="NaN or infinite values in y"):
        observer.run({"x": rows})
    assert observer.statistics.calls == 1
