# SPDX-License-Identifier: Apache-2.0
"""Models of one's own from config to answer: queries of every kind in split bundles, tokens, options without effect."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perceiver_export.calibration import validate
from perceiver_export.exporter import ExportOptions, LoadedModel, OwnModel, export, load_model
from perceiver_export.exporter.model import (
    ArrayInput,
    EncoderSizes,
    FourierPositions,
    GivenQueries,
    InputQueries,
    LearnedQueries,
    OutputConfig,
    PerceiverIO,
    PositionQueries,
    TokenInput,
    own_model,
)
from perceiver_export.exporter.model.config import Input
from perceiver_export.runtimes import load as load_bundle
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.engines import ort
from perceiver_export.runtimes.engines.backend import Engine, Source
from perceiver_export.runtimes.errors import BundleError, InputError, UnsupportedModelError, UsageError
from tests.calibration.onnx_text import write
from tests.conftest import SmallBundle
from tests.exporter.outputs import assert_bundle_gives
from tests.runtimes.test_arguments import wrong, wrong_by_name

ENCODER = EncoderSizes(4, 16, num_self_attentions_per_block=1)
POINTS = OutputConfig(PositionQueries((6,), FourierPositions(3, (6,))), (6, 2), 2)
RNG = np.random.default_rng(0)


def loaded(inputs: dict[str, Input], outputs: dict[str, OutputConfig]) -> LoadedModel:
    model = PerceiverIO(own_model(inputs, outputs, ENCODER)).eval()
    return LoadedModel(model, model.config, "arrays", "own", "a test")


def test_a_range_of_one_query_is_a_fixed_number(tmp_path: Path) -> None:
    model = loaded({"x": ArrayInput((5,), 3)}, {"y": POINTS})
    bundle = export(model, tmp_path / "b", ExportOptions(split=True, dynamic_queries=True, shape={"queries": (1,)}))

    (queries,) = [spec for spec in bundle.manifest.parts["decoder"].inputs if spec.name == "queries"]
    assert (queries.shape, queries.ranges) == ((1, 1), {})
    feeds = {"x": RNG.normal(size=(1, 5, 3)).astype(np.float32)}
    assert_bundle_gives(bundle, feeds, model.run(feeds))


def test_one_input_is_the_one_query(tmp_path: Path) -> None:
    model = loaded({"x": ArrayInput((1,), 3)}, {"y": OutputConfig(InputQueries(1, 3), (1, 2), 2)})
    bundle = export(model, tmp_path / "b", ExportOptions(split=True))

    feeds = {"x": RNG.normal(size=(1, 1, 3)).astype(np.float32)}
    assert_bundle_gives(bundle, feeds, model.run(feeds))


def test_a_decoder_takes_the_queries_of_its_own_output_only(tmp_path: Path) -> None:
    outputs = {
        "y": OutputConfig(InputQueries(5, 3), (5, 2), 2),
        "z": OutputConfig(GivenQueries(3, 4), (3, 2), 2),
        "one": OutputConfig(LearnedQueries(1, 4), (2,), 2),
    }
    model = loaded({"x": ArrayInput((5,), 3)}, outputs)
    bundle = export(model, tmp_path / "b", ExportOptions(split=True))

    takes = {name: [spec.name for spec in part.inputs] for name, part in bundle.manifest.parts.items()}
    assert takes == {
        "encoder": ["x"],
        "decoder_y": ["latents", "queries", "x"],
        "decoder_z": ["latents", "z_queries"],
        "decoder_one": ["latents"],
    }
    shapes = {"x": (1, 5, 3), "z_queries": (1, 3, 4)}
    feeds = {name: RNG.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    assert_bundle_gives(bundle, feeds, model.run(feeds))


def test_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    bundle = export(loaded({"words": TokenInput(7, 3, 8)}, {"y": POINTS}), tmp_path / "b")
    there = np.ones(3, int)
    with open_task(bundle) as run:
        assert run({"words": np.array([0, 6, 1]), "words_mask": there})["y"].shape == (6, 2)
        for token in (-1, 7):
            with pytest.raises(InputError, match=f"contains {token}, but the model takes 0 to 6"):
                run({"words": np.array([0, token, 1]), "words_mask": there})


def test_a_task_loads_each_part_once(small_bundle: SmallBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, opened = small_bundle("flow", split=True), list[str]()
    open_engine = ort.open

    def opening(source: Source, directory: Path | None, threads: int | None) -> Engine:
        opened.append(source.graph.name)
        return open_engine(source, directory, threads)

    monkeypatch.setattr(ort, "open", opening)
    frames = np.zeros((1, 2, 3, 16, 24), np.float32)
    with open_task(bundle, device="ort-cpu") as task:
        given = {"latents": task.part("encoder").run({"frames": frames})["latents"], "frames": frames}
        whole = task.runtime.run({"frames": frames})["flow"]
        queries = np.arange(16 * 24, dtype=np.int32)[None]
        rows = task.part("decoder").run({**given, "queries": queries})["flow"]
        np.testing.assert_array_equal(rows.reshape(whole.shape), whole)

    assert sorted(opened) == ["decoder.onnx", "encoder.onnx"]


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    classes = OutputConfig(LearnedQueries(1, 4), (2,), 2)
    model = loaded({"x": ArrayInput((5,), 3)}, {"y": classes})
    options: list[dict[str, Any]] = [
        {"split": True, "dynamic_queries": True},
        {"split": True, "shape": {"queries": (4,)}},
        {"dynamic_queries": True},
        {"task": "arrays"},
        {"parity": "deepmind"},
        {"config": "sizes.json"},
        {"shape": {"image": (3, 8, 8)}},
    ]
    for one in options:
        with pytest.raises(UsageError) as caught:
            export(model, tmp_path / "b", ExportOptions(**one))
        assert caught.value.hint
    assert not (tmp_path / "b").exists()


def test_the_path_of_imports_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model.py").write_text(
        "from perceiver_export.exporter.model import *\n"
        "def make():\n"
        "    outputs = {'y': OutputConfig(LearnedQueries(1, 4), (2,), 2)}\n"
        "    return PerceiverIO(own_model({'x': ArrayInput((5,), 3)}, outputs, EncoderSizes(4, 16, 1)))\n"
        "def broken():\n"
        "    raise KeyError\n"
        "def ending():\n"
        "    raise SystemExit(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    before = list(sys.path)

    assert load_model("my_model:make").task == "arrays"
    for name, error in (("broken", "KeyError"), ("ending", "SystemExit")):
        with pytest.raises(UsageError, match=rf"my_model:{name} failed: {error}\(") as caught:
            load_model(f"my_model:{name}")
        assert f'python -c "import my_model; my_model.{name}()"' in caught.value.hint
    for spec, said, hint in (
        ("my_model:mak", "my_model has no function 'mak'", "my_model:make"),
        ("my_model.py:make", "names a file", "my_model:make"),
        ("nowhere:make", "cannot be imported", "module:function"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            load_model(spec)
        assert hint in caught.value.hint
    with pytest.raises(UsageError, match="there is no input 'y'; the inputs are x"):
        load_model("my_model:make", shape={"y": (5,)})
    with pytest.raises(UsageError, match="the size of 'x'"):
        load_model("my_model:make", shape={"x": (5,)})
    assert sys.path == before
    sys.modules.pop("my_model")


def test_a_classifier_of_ones_own_has_labels_and_top_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The road that the example and the errors point to, whatever its output is called."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    bundle = export("examples.your_own:shapes", tmp_path / "shapes")
    clouds = RNG.normal(size=(30, 64, 3)).astype(np.float32)
    with open_task(bundle) as classify:
        said = [classify(cloud)[0].label for cloud in clouds]
    with load_bundle(bundle) as runtime:
        scores = np.concatenate([runtime.run({"points": cloud[None]})["scores"] for cloud in clouds])
    labels = scores.argmax(axis=1)
    np.savez(tmp_path / "data.npz", points=clouds, labels=np.array(bundle.manifest.labels)[labels])

    found = validate(bundle, tmp_path / "data.npz")

    assert set(said) <= set(bundle.manifest.labels)
    assert (bundle.manifest.source, bundle.manifest.output_kinds) == (
        "examples.your_own:shapes",
        {"scores": "single-label"},
    )
    assert (found.metrics[0].name, found.metrics[0].candidate.value) == ("top-1", 100)


def test_a_bare_model_is_sent_to_the_road_to_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])

    with pytest.raises(UsageError, match="preprocessing and labels of image-classification") as caught:
        load_model("examples.your_own:robot", task="image-classification")
    assert "LoadedModel.own(model, 'image-classification', labels=" in caught.value.hint
    with pytest.raises(UsageError, match="--task cannot be 'classify'"):
        load_model("examples.your_own:robot", task="classify")


def test_kinds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    body = "(float[1,5] x) => (float[1,2] y) { y = MatMul(x, w) }"
    model = load_model(write(tmp_path / "m.onnx", body, w=np.ones((5, 2), np.float32)))

    wrong: list[tuple[Any, str]] = [({"z": "regression"}, "'z'"), ({"y": "labels"}, "'labels'")]
    for kinds, message in wrong:
        with pytest.raises(UnsupportedModelError, match=message):
            export(dataclasses.replace(model, output_kinds=kinds), tmp_path / "b")
    bundle = export(dataclasses.replace(model, output_kinds={"y": "multi-label"}), tmp_path / "b")
    assert bundle.manifest.output_kinds == {"y": "multi-label"}
    own = loaded({"x": ArrayInput((5,), 3)}, {"y": OutputConfig(LearnedQueries(1, 4), (2,), 2)})
    with pytest.raises(BundleError, match="does not fit its task") as caught:
        export(LoadedModel.own(own.model, "image-classification"), tmp_path / "c")
    assert "preprocessing=" in caught.value.hint
    assert not (tmp_path / "c").exists()


class Fails(nn.Linear):
    def __init__(self, error: BaseException) -> None:
        super().__init__(8, 8)
        self.error = error

    def forward(self, input: Tensor) -> Tensor:
        raise self.error


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_what_no_module_can_be_made_of(tmp_path: Path) -> None:
    layer, row = nn.Linear(8, 8), torch.rand(2, 8)
    modules: list[tuple[Any, str]] = [
        (torch.jit.trace(layer, row), "module that it was made from"),
        (torch.export.export(layer, (row,)).module(), "module that it was made from"),
        (Fails(SystemExit(0)), "that forward(input) accepts"),
    ]
    for module, hint in modules:
        with pytest.raises(UnsupportedModelError) as caught:
            export((module, (row,)), tmp_path / "b")
        assert hint in caught.value.hint
    with pytest.raises(KeyboardInterrupt):
        export((Fails(KeyboardInterrupt()), (row,)), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_fields_of_the_wrong_type(tmp_path: Path) -> None:
    layer, row = nn.Linear(8, 8), torch.rand(2, 8)
    own = PerceiverIO(own_model({"x": ArrayInput((5,), 3)}, {"y": POINTS}, ENCODER))

    wrong(lambda value: export((value, (row,)), tmp_path / "b"))
    wrong(lambda value: export((layer, value), tmp_path / "b"))
    wrong(LoadedModel.own)
    wrong_by_name(functools.partial(LoadedModel.own, own), "labels notes preprocessing output_kinds", list, dict)
    names = "outputs labels task preprocessing output_kinds"
    wrong_by_name(lambda **given: export(OwnModel(layer, row, **given), tmp_path / "b"), names, list)
    assert not list(tmp_path.iterdir())


class Unusual(nn.Module):
    """Its forward has no signature, and its train returns nothing."""

    forward = staticmethod(torch.relu)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_bare_tensor_is_the_only_input(tmp_path: Path) -> None:
    bundle = export((Unusual(), -torch.ones(2, 8)), tmp_path / "b")

    (spec,) = bundle.manifest.parts["model"].inputs
    assert spec.shape == (2, 8)
    with load_bundle(bundle) as runtime:
        assert not runtime.run({spec.name: -np.ones((2, 8), np.float32)})["output"].any()
