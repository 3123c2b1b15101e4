# SPDX-License-Identifier: Apache-2.0
"""config.json means what it means in transformers: drawn configs of all seven classes, to the answers of pipelines."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perceiver_export.exporter import export, load_model
from perceiver_export.exporter.checkpoints.huggingface_config import ACTIVATIONS, TASKS, read_by
from perceiver_export.exporter.verification import TOLERANCE
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.errors import CheckpointError
from perceiver_export.runtimes.tasks import FillMask, ImageClassification, OpticalFlow, TextClassification
from perceiver_export.runtimes.tasks.base import Prediction, Value, answer

from .conftest import SHALLOW, ExportKind, make_transformers_model, moved
from .test_checkpoints_page import ignored_fields
from .transformers_reference import run_transformers

PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification", "of my own")
TEXT = "Ein Krimi, très bon"
ONE_LAYER = {"num_blocks": 1, "num_self_attends_per_block": 1}
DRAWS = 5


def draw(name: str, seed: int) -> dict[str, Any]:
    """A config of a class, as JSON: what it reads is drawn, and what transformers ignores is nonsense."""
    rng = np.random.default_rng([list(TASKS).index(name), seed])

    def one(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    width = one(8, 16, 24)
    qk, v = one((None, None), (None, width), (16, width), (width, None))
    side = int(rng.integers(9, 14))
    config = {
        "model_type": "perceiver",
        "architectures": [name],
        "num_latents": int(rng.integers(1, 8)),
        "d_latents": width,
        "d_model": one(8, 16, 40),
        "num_blocks": one(1, 2),
        "num_self_attends_per_block": one(0, 1, 2),
        "num_self_attention_heads": one(1, 2, 4),
        "num_cross_attention_heads": 1 if qk is None else one(1, 2),
        "qk_channels": qk,
        "v_channels": v,
        "cross_attention_shape_for_attention": one("kv", "q"),
        "self_attention_widening_factor": one(1, 2, 3),
        "cross_attention_widening_factor": one(1, 2, 3),
        "hidden_act": one(*ACTIVATIONS),
        "use_query_residual": one(True, False),
        "vocab_size": 262,
        "max_position_embeddings": int(rng.integers(30, 40)),
        "image_size": side,
        "train_size": [int(rng.integers(5, 9)), int(rng.integers(5, 9))],
        "num_frames": one(2, 3),
        "audio_samples_per_frame": 12,
        "samples_per_patch": one(3, 4),
        "output_num_channels": int(rng.integers(3, 9)),
        "_label_trainable_num_channels": one(5, 600),
        "layer_norm_eps": 0.5,
        "attention_probs_dropout_prob": 0.9,
        "chunk_size_feed_forward": 0,
        "task_specific_params": {"text-classification": {"problem_type": "regression"}},
        "problem_type": one(*PROBLEMS),
        **draw_labels(rng),
    }
    if config.get("num_labels") == 1 and config["problem_type"] == "single_label_classification":
        config["problem_type"] = None  # transformers refuses it
    return {**config, "output_shape": [1, config["num_frames"], 8, 12]}


def draw_labels(rng: np.random.Generator) -> dict[str, Any]:
    count = int(rng.integers(1, 6))
    names: list[Any] = [f"name {i}" for i in rng.permutation(count)]
    if count == 1:
        return {"num_labels": 1}
    drawn: list[dict[str, Any]] = [
        {"num_labels": count},
        {"id2label": {str(i): names[i] for i in rng.permutation(count).tolist()}},
        {"id2label": {str(i): 10 - i for i in range(count)}, "num_labels": count},
        {},
    ]
    return drawn[rng.integers(len(drawn))]


def build(config: dict[str, Any], directory: Path) -> Any:
    """transformers' model of a config, with every parameter away from its default, and its directory."""
    import transformers

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(transformers, config["architectures"][0])(transformers.PerceiverConfig.from_dict(dict(config)))
    model = moved(made)
    model.eval().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    return model


def shape_of(name: str, config: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """The image that a classifier is exported for."""
    if TASKS[name] != "image-classification":
        return {}
    side = config["image_size"]
    return {"image": (3, side, side) if "Learned" in name else (3, 23, 18)}


def make_feeds(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Random inputs of a model in float64, by the config that we made of transformers'."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, *shape, dtype=torch.float64, generator=generator)

    feeds: dict[str, Tensor] = {}
    for name, one in inputs.items():
        if name == "tokens":
            feeds[name] = torch.randint(0, 262, (1, one.length), generator=generator)
            feeds["tokens_mask"] = (torch.arange(one.length)[None] % 5 > 0).int()
        elif name == "image":
            feeds[name] = noise(3, one.height, one.width)
        elif name == "frames" and not hasattr(one, "shape"):
            feeds[name] = noise(2, 3, one.height, one.width)
        elif name != "label":
            feeds[name] = noise(*one.shape, one.num_channels)
    return feeds


@pytest.mark.parametrize("seed", range(DRAWS))
@pytest.mark.parametrize("name", TASKS)
def test_drawn_configs_give_what_transformers_gives(name: str, seed: int, tmp_path: Path) -> None:
    config = draw(name, seed)
    theirs = build(config, tmp_path).double()
    ours = load_model(tmp_path, shape=shape_of(name, config))
    feeds = make_feeds(ours.config.inputs)

    with torch.no_grad():
        expected, found = run_transformers(theirs, feeds), ours.model.double()(feeds)

    assert found.keys() == expected.keys()
    for output, values in expected.items():
        assert (found[output].flatten() - values.flatten()).abs().max() <= 1e-9 * values.abs().max(), config
    if ours.labels:
        assert ours.labels == tuple(str(theirs.config.id2label[i]) for i in range(theirs.config.num_labels))


def test_every_activation_is_transformers() -> None:
    from transformers.activations import ACT2FN

    from perceiver_export.exporter.model.attention import Elementwise

    x = torch.cat([torch.linspace(-30, 30, 1001), torch.tensor([-1e4, 1e4])]).double()
    assert {"prelu", "xielu"} == ACT2FN.keys() - ACTIVATIONS.keys()  # have parameters
    for theirs, ours in ACTIVATIONS.items():
        torch.testing.assert_close(Elementwise(ours)(x), ACT2FN[theirs](x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", TASKS)
def test_the_table_names_what_transformers_reads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field that a class reads while it is built and run, of those that PerceiverConfig declares."""
    import transformers
    from transformers import PerceiverConfig

    own, read = set(PerceiverConfig.__annotations__), set()
    plain: Any = PerceiverConfig.__getattribute__

    def recorded(config: PerceiverConfig, field: str) -> Any:
        read.add(field)
        return plain(config, field)

    widths = {"qk_channels": None, "v_channels": None, "num_cross_attention_heads": 1}
    config = draw(name, 0) | widths | {"num_self_attends_per_block": 1}
    directory = tmp_path / "model"
    build(config, directory)
    ours = load_model(directory, shape=shape_of(name, config))
    feeds = {
        key: value.float() if value.is_floating_point() else value
        for key, value in make_feeds(ours.config.inputs).items()
    }
    full: Any = PerceiverConfig.from_dict(dict(config))
    built: Any = getattr(transformers, name)
    monkeypatch.setattr(PerceiverConfig, "__getattribute__", recorded)
    with torch.no_grad():
        run_transformers(built(full).eval(), feeds)
    monkeypatch.undo()

    ignored = ignored_fields()
    table = {field for field, classes in read_by().items() if name in classes}
    if TASKS[name] == "optical-flow":
        read.discard("num_labels")
    assert read & own - ignored == table & own
    assert not ignored & table


def scores(predictions: list[Prediction]) -> dict[str, float]:
    """A classifier's answer by label."""
    return {one.label: one.value if isinstance(one, Value) else one.probability for one in predictions}


def test_text_classifiers_answer_as_the_pipeline(tmp_path: Path) -> None:
    from transformers import PerceiverTokenizer, pipeline

    labels = {"id2label": {"2": 7, "0": "b", "1": "c"}, "num_labels": 3}
    config = draw("PerceiverForSequenceClassification", 1) | labels | ONE_LAYER
    model = build(config, tmp_path / "model")
    bundle = export(tmp_path / "model", tmp_path / "bundle")
    with open_task(bundle, TextClassification) as task:
        logits = task.outputs([TEXT])["logits"][0]

    for problem in PROBLEMS:
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"problem_type": problem}))
        model.config.problem_type = problem
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ask = pipeline("text-classification", model=model, tokenizer=PerceiverTokenizer(), device="cpu")
        expected = {str(one["label"]): one["score"] for one in ask(TEXT, top_k=None)}
        loaded = load_model(tmp_path / "model")
        found = scores(answer(logits, loaded.output_kinds["logits"], loaded.labels, top=3))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), problem


def test_one_label_that_excludes_others_is_refused_as_by_transformers(tmp_path: Path) -> None:
    import transformers

    theirs: Any = transformers.PerceiverConfig
    config = draw("PerceiverForSequenceClassification", 1) | {"num_labels": 1, "problem_type": None}
    config.pop("id2label", None)
    build(config, tmp_path / "model")
    refused = config | {"problem_type": PROBLEMS[2]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(refused))

    with pytest.raises(ValueError, match="requires `num_labels > 1`"):
        theirs(num_labels=1, problem_type=PROBLEMS[2])
    with pytest.raises(CheckpointError, match="single_label_classification"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task == "image-classification"])
def test_image_classifiers_answer_as_the_pipeline(name: str, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import pipeline
    from transformers.models.perceiver.image_processing_pil_perceiver import PerceiverImageProcessorPil

    index = list(TASKS).index(name)
    config = draw(name, 3) | ONE_LAYER | {"problem_type": PROBLEMS[index], "num_labels": 1 + index}
    config.pop("id2label", None)
    model = build(config, tmp_path / "model")
    _, height, width = shape_of(name, config)["image"]
    processor = PerceiverImageProcessorPil(
        size={"height": height, "width": width}, crop_size={"height": height + 5, "width": width + 3}
    )
    processor.save_pretrained(tmp_path / "model")
    picture = np.random.default_rng(0).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "image.png")
    ask = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    expected = {one["label"]: one["score"] for one in ask(str(tmp_path / "image.png"))}

    bundle = export(tmp_path / "model", tmp_path / "bundle")

    with open_task(bundle, ImageClassification) as task:
        assert scores(task(tmp_path / "image.png")) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_masked_texts_are_filled_as_by_the_pipeline(export_kind: ExportKind) -> None:
    from transformers import PerceiverTokenizer, pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_transformers_model("language", **SHALLOW)
        ask = pipeline("fill-mask", model=model, tokenizer=PerceiverTokenizer(), device="cpu")
        expected = ask("Kr[MASK]mi, très bon", top_k=4)

    with open_task(export_kind("language", "split, dynamic"), FillMask) as task:
        (blank,) = task("Kr[MASK]mi, très bon", top=4).blanks
    assert [one.token for one in blank.candidates] == [one["token"] for one in expected]
    assert [one.probability for one in blank.candidates] == pytest.approx([one["score"] for one in expected], rel=1e-3)


def test_flow_is_transformers(export_kind: ExportKind) -> None:
    pair = np.random.default_rng(0).integers(0, 256, (2, 11, 14, 3), dtype=np.uint8)
    frames = torch.from_numpy(pair / 255 * 2 - 1).float().permute(0, 3, 1, 2)[None]
    with torch.no_grad():
        expected = run_transformers(make_transformers_model("flow", **SHALLOW), {"frames": frames})["flow"][0].numpy()

    with open_task(export_kind("flow", "whole"), OpticalFlow) as task:
        found = task(pair[0], pair[1])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"id2label": {"1": "a", "2": "b"}}, ("LABEL_0", "a")),
        ({"id2label": {"0": "a", "2": None, "1": "c"}}, ("a", "c", "LABEL_2")),
        ({"id2label": {"1": 10, "0": 2.5, "2": "x"}}, ("2.5", "10", "x")),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 2}, ("LABEL_0", "LABEL_1")),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({}, ("LABEL_0", "LABEL_1")),
    ],
)
def test_output_i_is_called_id2label_i(labels: dict[str, Any], expected: tuple[str, ...], tmp_path: Path) -> None:
    config = {**draw("PerceiverForImageClassificationFourier", 0), "num_labels": None, "id2label": None}
    build(config | {"num_labels": len(expected)}, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | labels))

    loaded = load_model(tmp_path, shape={"image": (3, 6, 6)})

    assert loaded.labels == expected
    assert any("label" in note for note in loaded.notes) == any(name.startswith("LABEL_") for name in expected)
