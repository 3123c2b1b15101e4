# SPDX-License-Identifier: Apache-2.0
"""DATA of every kind as a bundle's inputs, and what is said of it."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration.data_report import DataWatch
from perceiver_export.calibration.feeds import Example, open_feeds
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.manifest import Manifest
from tests.conftest import FASHION


@pytest.fixture(scope="module")
def pictures(fashion_bundle: Path) -> Manifest:
    return open_bundle(fashion_bundle).manifest


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    from perceiver_export.exporter import export
    from tests.cli.small_models import sentiment

    return export(sentiment(), tmp_path_factory.mktemp("bundles") / "text", split=True).manifest


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    from perceiver_export.exporter import export
    from tests.cli.small_models import points as small

    return export(small(), tmp_path_factory.mktemp("bundles") / "points").manifest


def read(data: Any, manifest: Manifest, samples: int | None = None) -> list[Example]:
    opened = open_feeds(data, manifest, samples)
    found = list(opened.stream)
    assert opened.count in (None, len(found))
    return found


def test_pictures_are_prepared_as_the_bundle_says(pictures: Manifest) -> None:
    (first, *_) = read(FASHION / "pictures", pictures)

    assert first.feeds["image"].shape == (3, 28, 28)
    assert first.feeds["image"].dtype == np.float32
    assert first.label is not None


def test_samples_are_spread_over_the_data(pictures: Manifest) -> None:
    found = read(FASHION / "held_out.npz", pictures, samples=4)

    assert [example.name for example in found] == [f"held_out.npz[{index}]" for index in (0, 500, 1000, 1500)]


def test_lines_of_text(texts: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "fine", "label": "good"}\n\n{"text": "awful", "label": 0}\n{"text": "so so"}\n')
    found = read(path, texts)

    assert [example.label for example in found] == [1, 0, None]
    assert set(found[0].feeds) == {"tokens", "tokens_mask"}  # of both parts, without latents
    assert found[0].feeds["tokens"].shape == (32,)
    assert int(found[0].feeds["tokens_mask"].sum()) == 6  # [CLS], four bytes, [SEP]


@pytest.mark.parametrize("sharded", [False, True])
def test_arrays_by_input_name(sharded: bool, points: Manifest, tmp_path: Path) -> None:
    names = [spec.name for spec in points.parts["model"].inputs]
    inputs = points.parts["model"].inputs
    shapes = {spec.name: [dim for dim in spec.shape[1:] if isinstance(dim, int)] for spec in inputs}
    generator = np.random.default_rng(0)
    for shard in range(3 if sharded else 1):
        arrays = {name: generator.normal(size=(4, *shapes[name])).astype(np.float64) for name in names}
        arrays |= {name: (arrays[name] > 0).astype(np.int64) for name in names if name.endswith("_mask")}
        np.savez(tmp_path / f"{shard}.npz", labels=np.arange(4), **arrays)  # type: ignore[arg-type]
    found = read(tmp_path if sharded else tmp_path / "0.npz", points)

    assert len(found) == (12 if sharded else 4)
    assert [example.label for example in found[:4]] == [0, 1, 2, 3]
    assert all(str(array.dtype) in ("float32", "int32") for array in found[0].feeds.values())


def test_a_function_and_an_iterable(pictures: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import numpy as np\ndef samples():\n    yield {'image': np.zeros((28, 28), np.uint8), 'label': 3}\n"
    (tmp_path / "own_samples.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    assert [example.label for example in read("own_samples:samples", pictures)] == [3]
    assert len(read([{"image": np.zeros((1, 3, 28, 28), np.float32)}], pictures)) == 1


def test_random_numbers_fit_every_input(texts: Manifest, points: Manifest) -> None:
    for manifest in (texts, points):
        for example in itertools.islice(open_feeds("random", manifest).stream, 3):
            assert all(np.isfinite(array).all() for array in example.feeds.values())


def failing() -> Iterator[dict[str, Any]]:
    yield {"image": np.zeros((3, 28, 28), np.float32)}
    raise ValueError("the camera is off")


def test_data_that_does_not_fit_is_refused(
    pictures: Manifest, texts: Manifest, points: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"txt": 1}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "label.jsonl").write_text(json.dumps({"text": "x", "label": "ugly"}) + "\n")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "\xff"}\n')
    np.savez(tmp_path / "other.npz", other=np.zeros(3))
    np.savez(tmp_path / "more.npz", tokens=np.zeros((2, 32)), tokens_mask=np.zeros((2, 32)), more=np.zeros(2))
    np.savez(tmp_path / "rows.npz", tokens=np.zeros((2, 32)), tokens_mask=np.zeros((3, 32)))
    np.savez(tmp_path / "floats.npz", tokens=np.zeros((2, 32)), tokens_mask=np.zeros((2, 32)))
    cases: list[tuple[Any, Manifest, str]] = [
        (tmp_path / "bad.jsonl", texts, r"bad.jsonl, line 1 is not an object with a `text`"),
        (tmp_path / "number.jsonl", texts, "`text` is of type int"),
        (tmp_path / "label.jsonl", texts, "'ugly' is not a label"),
        (tmp_path / "bytes.jsonl", texts, "cannot be read"),
        (tmp_path / "bad.jsonl", points, "holds text, the bundle is of point-cloud"),
        (tmp_path / "other.npz", texts, "has no 'tokens', it holds other"),
        (tmp_path / "more.npz", texts, "holds 'more', which the model does not take"),
        (tmp_path / "rows.npz", texts, "samples"),
        (tmp_path / "floats.npz", texts, r"'tokens' of floats.npz\[0\] is float64"),
        (tmp_path, points, "has no"),
        (FASHION / "pictures", texts, "is not data for text-classification"),
        (tmp_path / "nowhere", texts, "does not exist"),
        (failing(), pictures, "failed at sample 1: ValueError"),
        ([{}], pictures, "has no 'image', it has|has no 'image'"),
    ]
    for data, manifest, message in cases:
        with pytest.raises(DataError, match=message):
            read(data, manifest)


def test_fingerprints_know_samples_whatever_their_order(pictures: Manifest) -> None:
    examples = read(FASHION / "held_out.npz", pictures, samples=40)
    forwards, backwards, fewer = (DataWatch(pictures, "x") for _ in range(3))
    for example in examples:
        forwards.see(example)
    for example in reversed(examples):
        backwards.see(example)
    for example in examples[1:]:
        fewer.see(example)

    assert forwards.report().fingerprint == backwards.report().fingerprint != fewer.report().fingerprint
    assert len(set(forwards.digests)) == 40
    assert forwards.report().warnings == ()


def test_doubtful_data_is_told(pictures: Manifest) -> None:
    watch = DataWatch(pictures, "random")
    for _ in range(3):
        watch.see(Example({"image": np.full((3, 28, 28), 255.0, np.float32)}, 0, "bright"))
    warnings = " | ".join(watch.report().warnings)

    for told in (
        "random numbers",
        "3 samples",
        "2 of 3 samples are repeated",
        "one class",
        "same in all",
        "255 to 255",
    ):
        assert told in warnings
