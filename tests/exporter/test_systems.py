# SPDX-License-Identifier: Apache-2.0
"""Each of transformers' systems, exported whole and split, gives what transformers gives, and decodes what is asked."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from perceiver_export.exporter import ExportOptions, export, load_model
from perceiver_export.runtimes import load, open_task
from perceiver_export.runtimes.errors import InputError, UsageError
from perceiver_export.runtimes.split import decode
from perceiver_export.runtimes.tasks import VideoAutoencoding

from .conftest import SHALLOW, ExportKind, MakeCheckpoint, make_transformers_model
from .outputs import assert_close
from .transformers_reference import make_feeds, run_transformers

KINDS = ["fourier", "language", "text", "flow", "video"]
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
Arrays = dict[str, npt.NDArray[Any]]


def samples(kind: str) -> tuple[Arrays, Arrays]:
    """Two samples, and transformers' answers to them."""
    feeds = {name: tensor[:2] for name, tensor in make_feeds(kind, torch.float32).items()}
    with torch.no_grad():
        expected = run_transformers(make_transformers_model(kind, **SHALLOW), feeds)
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    return arrays, {name: tensor.numpy() for name, tensor in expected.items()}


SPLIT = [
    ("language", "split"),
    ("flow", "split"),
    *((kind, "split, dynamic") for kind in ("language", "flow", "video")),
]


@pytest.mark.parametrize(("kind", "options"), [*itertools.product(KINDS, ("whole", "split, dynamic")), *SPLIT[:2]])
def test_bundles_give_what_transformers_gives(kind: str, options: str, export_kind: ExportKind) -> None:
    bundle = export_kind(kind, options)
    feeds, expected = samples(kind)

    with load(bundle) as runtime:
        found = runtime.run(feeds)
        into = {name: np.empty_like(array) for name, array in found.items()}
        runtime.run(feeds, out=into)
    assert_close(found, {name: array.reshape(found[name].shape) for name, array in expected.items()}, 2e-5)
    for name, array in found.items():
        np.testing.assert_array_equal(into[name], array)
    for part in bundle.manifest.parts.values():
        operators = {node.op_type for node in ir.load(bundle.path / part.file).graph}
        assert not operators & RANDOM


@pytest.mark.parametrize(("kind", "options"), SPLIT)
def test_a_decoder_decodes_the_queries_it_is_asked_for(kind: str, options: str, export_kind: ExportKind) -> None:
    bundle, part = export_kind(kind, options), "decoder_video" if kind == "video" else "decoder"
    feeds, expected = samples(kind)
    count = bundle.manifest.parts[part].num_queries
    assert count is not None
    with load(bundle, part="encoder") as encoder, load(bundle, part=part) as decoder:
        output = decoder.outputs[0].name
        rows = expected[output].reshape(2, count, -1)
        latents = encoder.run({spec.name: feeds[spec.name] for spec in encoder.inputs})
        given = {spec.name: {**feeds, **latents}[spec.name] for spec in decoder.inputs if spec.name != "queries"}
        for queries in ([count - 1], [0, 3, 3, 1, 5, 2, 4, 6, 0, count - 2], list(range(7))):
            found = decode(decoder, given, np.array(queries), count)
            np.testing.assert_allclose(found, rows[:, queries], rtol=0, atol=2e-5 * np.abs(rows).max())
        each = np.array([[1, 2], [3, 0]])
        np.testing.assert_allclose(
            decode(decoder, given, each, count),
            np.stack([rows[0, [1, 2]], rows[1, [3, 0]]]),
            rtol=0,
            atol=2e-5 * np.abs(rows).max(),
        )
        for wrong in ([-1], [count], [], [[1], [2], [3]], [0.5]):
            with pytest.raises(InputError):
                decode(decoder, given, np.array(wrong))
        with pytest.raises(InputError, match="the model takes 0 to"):
            decoder.run({**given, "queries": np.full((2, 7), count, np.int32)})


def test_only_the_label_of_a_video_is_decoded(export_kind: ExportKind) -> None:
    bundle = export_kind("video", "split, dynamic")
    feeds, expected = samples("video")

    assert [spec.name for spec in bundle.manifest.parts["encoder"].inputs] == ["audio", "frames"]  # no label goes in
    with load(bundle, part="encoder") as encoder, load(bundle, part="decoder_label") as decoder:
        found = decoder.run(encoder.run(feeds))
    assert_close(found, {"label": expected["label"].reshape(found["label"].shape)}, 2e-5)


def test_a_video_has_no_rate_that_nobody_said(export_kind: ExportKind) -> None:
    feeds, expected = samples("video")
    with open_task(export_kind("video", "whole"), VideoAutoencoding) as task:
        assert task.preprocessing.sample_rate is None
        found = task.run_inputs(feeds)
    assert_close(found, {name: array.reshape(found[name].shape) for name, array in expected.items()}, 2e-5)


def test_parts_share_one_file_of_weights(export_kind: ExportKind) -> None:
    whole, parts = export_kind("video", "whole"), export_kind("video", "split, dynamic")

    assert [name for name in parts.manifest.files if name.endswith(".weights")] == ["model.weights"]
    assert parts.manifest.files["model.weights"].size <= whole.manifest.files["model.weights"].size


def test_splitting_is_the_default_for_video_only(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert load_model(make_checkpoint("video")).split
    assert not load_model(make_checkpoint("flow")).split
    for wrong in ((0,), (2, 3)):
        with pytest.raises(UsageError, match="shape of `queries`"):
            export(make_checkpoint("flow"), tmp_path / "bundle", ExportOptions(split=True, shape={"queries": wrong}))
