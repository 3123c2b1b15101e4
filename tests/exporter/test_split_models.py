# SPDX-License-Identifier: Apache-2.0
"""`--split` of any module and ONNX file: encode once, decode the rows that are asked for; refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from perceiver_export.calibration import QuantizeOptions, ValidateOptions, lint, quantize, validate
from perceiver_export.exporter import ExportOptions, export, inspect_bundle, load_model, load_reference
from perceiver_export.exporter import trace as tracing
from perceiver_export.runtimes import Bundle, decode, load
from perceiver_export.runtimes.errors import PerceiverExportError, UnsupportedModelError, UsageError
from tests.exporter import split_modules
from tests.exporter.conftest import TracedOnce
from tests.exporter.outputs import assert_close

MODULES = "tests.exporter.split_modules"
RNG = np.random.default_rng(0)


def assert_same(bundle: Bundle, source: str, samples: int = 1) -> None:
    """Whole, and each part by itself with rows in any order, another choice for each sample."""
    reference = load_model(source)
    feeds = {
        name: RNG.standard_normal((samples, *array.shape[1:]), dtype=np.float32)
        for name, array in reference.model.examples.items()
    }
    expected = reference.run(feeds)
    with load(bundle) as runtime:
        found = runtime.run(feeds)
    with load(bundle, part="encoder") as encoder:
        feeds |= encoder.run({spec.name: feeds[spec.name] for spec in encoder.inputs})
    assert_close(found, expected, 2e-5)
    for name, part in bundle.manifest.parts.items():
        if part.num_queries is None:
            continue
        rows = RNG.integers(part.num_queries, size=(samples, 9))
        with load(bundle, part=name) as decoder:
            own = {spec.name: feeds[spec.name] for spec in decoder.inputs if spec.name in feeds}
            decoded = decode(decoder, own, rows)
        (output,) = (spec.name for spec in part.outputs)
        whole = expected[output].reshape(samples, part.num_queries, -1)
        asked = np.take_along_axis(whole, rows[..., None], axis=1).reshape(decoded.shape)
        np.testing.assert_allclose(decoded, asked, rtol=0, atol=2e-5 * np.abs(whole).max())


def shapes(bundle: Bundle) -> dict[str, dict[str, tuple[int | str, ...]]]:
    parts = bundle.manifest.parts.items()
    return {name: {spec.name: spec.shape for spec in (*part.inputs, *part.outputs)} for name, part in parts}


@pytest.mark.parametrize(
    ("options", "samples", "batch", "queries"),
    [
        (ExportOptions(split=True), 1, 1, 24),
        (ExportOptions(latents="encoder", shape={"queries": (7,)}, fold=False), 1, 1, 7),
        (ExportOptions(split=True, dynamic_queries=True, batch="1:2:3"), 3, "batch", "queries"),
    ],
)
def test_a_grid_is_decoded_row_by_row(
    options: ExportOptions, samples: int, batch: int | str, queries: int | str, tmp_path: Path
) -> None:
    bundle = export(f"{MODULES}:cells", tmp_path / "b", options)

    assert shapes(bundle) == {
        "encoder": {"tokens": (batch, 60, 5), "latents": (batch, 6, 32)},
        "decoder": {"latents": (batch, 6, 32), "queries": (1, queries), "output": (batch, queries, 3)},
    }
    assert [spec.shape for spec in bundle.manifest.outputs] == [(batch, 4, 6, 3)]
    assert_same(bundle, f"{MODULES}:cells", samples)


LATENTS: dict[str, tuple[int | str, ...]] = {"latents": (1, 6, 32)}
DECODERS: dict[str, dict[str, dict[str, tuple[int | str, ...]]]] = {
    # Queries that are an input, and outputs without rows.
    "shape": {
        "decoder_occupancy": {**LATENTS, "queries": (1, 20), "points": (1, 50, 3), "occupancy": (1, 20)},
        "decoder_label": {**LATENTS, "label": (1, 7)},
        "decoder_code": {**LATENTS, "code": (1, 6, 32)},
    },
    # An input that is called queries.
    "queried": {"decoder": {**LATENTS, "query_indices": (1, 50), "queries": (1, 50, 3), "output": (1, 50)}},
    # Rows that read each other are decoded together.
    "mixed": {"decoder": {**LATENTS, "output": (1, 4, 6, 3)}},
}


@pytest.mark.parametrize("function", DECODERS)
def test_decoders_take_and_give_what_they_need(function: str, tmp_path: Path) -> None:
    options = ExportOptions(split=True, shape={"queries": (20,)} if function == "shape" else {})
    bundle = export(f"{MODULES}:{function}", tmp_path / "b", options)

    assert shapes(bundle) == {"encoder": {"tokens": (1, 60, 5), **LATENTS}, **DECODERS[function]}
    assert_same(bundle, f"{MODULES}:{function}")
    if function == "queried":  # the same model becomes the same bytes
        assert export(f"{MODULES}:{function}", tmp_path / "again", options).manifest.files == bundle.manifest.files


@pytest.mark.filterwarnings("ignore")  # torch's own about its older exporter
@pytest.mark.usefixtures("untimed")
def test_an_onnx_file_from_split_to_int8(tmp_path: Path) -> None:
    """Cut at a tensor by its name in the file, quantized, validated against the file, linted, inspected."""
    module, inputs = split_modules.cells()
    path = tmp_path / "m.onnx"
    names: dict[str, Any] = {"input_names": ["tokens"], "output_names": ["found"]}
    torch.onnx.export(module.eval(), tuple(inputs.values()), str(path), dynamo=False, opset_version=17, **names)
    *_, latents = (node.output[0] for node in onnx.load(path).graph.node if node.name.startswith("/encoder/mix/Add"))
    bundle = export(path, tmp_path / "b", ExportOptions(latents=latents, shape={"queries": (5,)}))
    assert shapes(bundle)["decoder"] == {"latents": (1, 6, 32), "queries": (1, 5), "found": (1, 5, 3)}
    assert_same(bundle, str(path))

    data = tmp_path / "data.npz"
    tokens = RNG.standard_normal((24, 60, 5), dtype=np.float32)
    np.savez(data, tokens=tokens, found=load_model(path).run({"tokens": tokens})["found"])
    int8 = quantize(bundle, data, tmp_path / "int8", QuantizeOptions(samples=16))
    reference = load_reference(int8.path, str(path))
    validated = validate(int8, data, ValidateOptions(against=reference, device="ort-cpu"))
    assert validated.samples == 24
    assert not validated.failure
    lint(int8.path)
    assert [*inspect_bundle(int8.path).parts] == ["encoder", "decoder"]


@pytest.fixture
def same_trace(function: str, monkeypatch: pytest.MonkeyPatch, traced_once: TracedOnce) -> None:
    """A module is traced once for all of its cases: it is refused for what the graph is."""
    trace = vars(tracing)["_traced"]

    def once(*arguments: Any) -> ir.Model:
        return traced_once(function, lambda: trace(*arguments))

    monkeypatch.setattr(tracing, "_traced", once)


@pytest.mark.usefixtures("same_trace")
@pytest.mark.parametrize(
    ("function", "options", "error", "datum"),
    [
        ("cells", ExportOptions(latents="encodr"), UsageError, "encodr"),
        ("cells", ExportOptions(latents="encoder.mux"), UsageError, r"hint: .*encoder\.mix"),  # a close one
        ("cells", ExportOptions(latents="tokens"), UsageError, "tokens"),
        ("cells", ExportOptions(latents="encoder", split=False), UsageError, "--no-split"),
        ("mixed", ExportOptions(split=True, dynamic_queries=True), UsageError, "decoder"),
        ("mixed", ExportOptions(split=True, shape={"queries": (4,)}), UsageError, "decoder"),
        ("turned", ExportOptions(split=True, dynamic_queries=True), UsageError, "rows"),
        ("cells", ExportOptions(dynamic_queries=True), UsageError, "split"),
        ("skipped", ExportOptions(latents="encoder"), UsageError, "tokens"),
        ("skipped", ExportOptions(split=True), UnsupportedModelError, "latents"),
        ("no_latents", ExportOptions(split=True), UnsupportedModelError, "latents"),
        ("named_like_ours", ExportOptions(split=True), UsageError, "latents"),
    ],
)
def test_splits_that_are_refused(
    function: str, options: ExportOptions, error: type[PerceiverExportError], datum: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=datum) as raised:
        export(f"{MODULES}:{function}", tmp_path / "b", options)
    assert raised.value.hint
    assert not list(tmp_path.iterdir())
