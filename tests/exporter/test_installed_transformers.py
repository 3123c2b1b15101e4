# SPDX-License-Identifier: Apache-2.0
"""`--use-transformers`: directories of other classes than our Perceivers, as the installed transformers builds them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from perceiver_export.calibration import ValidateOptions, validate
from perceiver_export.exporter import ExportOptions, export, load_model, load_reference
from perceiver_export.exporter.checkpoints.installed import text_config
from perceiver_export.runtimes import load, open_task
from perceiver_export.runtimes.errors import (
    CheckpointError,
    MissingDependencyError,
    PerceiverExportError,
    UnsupportedModelError,
    UsageError,
)
from tests.cli.commands import fail, succeed

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
LABELS: dict[str, Any] = {"num_labels": 3}
RNG = np.random.default_rng(0)


def saved(directory: Path, name: str, config: Any) -> Path:
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(directory)
    return directory


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    config = transformers.ViTConfig(image_size=24, patch_size=8, id2label={0: "bag", 1: "coat", 2: "shoe"}, **SIZES)
    directory = saved(tmp_path / "vit", "ViTForImageClassification", config)
    transformers.ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(directory)
    return directory


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=20, **SIZES, **LABELS)
    return saved(tmp_path / "bert", "BertForSequenceClassification", config)


def detr(directory: Path) -> Path:
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    parts = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    sizes: dict[str, Any] = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in parts.items()}
    sizes |= {"use_timm_backbone": False, "backbone": None, "backbone_config": backbone, "d_model": 32}
    return saved(directory, "DetrForObjectDetection", transformers.DetrConfig(num_queries=6, **sizes))


def test_an_image_classifier_with_labels_and_preprocessing(vit: Path, tmp_path: Path) -> None:
    succeed("export", vit, "-o", tmp_path / "b", "--use-transformers", "--batch", "1:1:4")
    images = [RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8) for _ in range(4)]
    with open_task(tmp_path / "b", device="ort-cpu") as classify:
        found = {answer.label: answer.probability for answer in classify(images[0])}
    prepared = transformers.ViTImageProcessor.from_pretrained(vit)(images[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = transformers.ViTForImageClassification.from_pretrained(vit)(prepared).logits.softmax(-1)[0]

    assert found == pytest.approx(dict(zip(("bag", "coat", "shoe"), expected.tolist(), strict=True)), abs=1e-4)
    np.savez(tmp_path / "data.npz", image=np.stack(images), labels=np.array(["bag", "coat", "shoe", "bag"]))
    reference = load_reference(tmp_path / "b", str(vit))
    measured = validate(tmp_path / "b", tmp_path / "data.npz", ValidateOptions(against=reference, device="ort-cpu"))
    top1 = measured.metrics[0]
    assert top1.reference is not None
    assert top1.candidate.value == top1.reference.value
    assert measured.reference is not None
    assert measured.reference["graphs"].keys() == {"model.safetensors"}


def test_a_text_classifier_takes_tokens_and_masks(bert: Path, tmp_path: Path) -> None:
    bundle = export(bert, tmp_path / "b", ExportOptions(use_transformers=True, shape={"input_ids": (12,)}))
    feeds = {"input_ids": RNG.integers(0, 60, (1, 12)), "attention_mask": np.ones((1, 12), np.int64)}
    feeds |= {"token_type_ids": RNG.integers(0, 2, (1, 12))}
    feeds["attention_mask"][:, 9:] = 0
    with torch.no_grad():
        model = transformers.BertForSequenceClassification.from_pretrained(bert)
        expected = model(**{name: torch.from_numpy(array) for name, array in feeds.items()}).logits.numpy()

    with load(bundle) as runtime:
        np.testing.assert_allclose(runtime.run(feeds)["logits"], expected, atol=1e-5)
    np.testing.assert_allclose(load_reference(bundle.path, str(bert))(feeds)["logits"], expected, atol=1e-5)
    assert "BertForSequenceClassification" in bundle.manifest.notes[0]
    assert (bundle.manifest.labels[2], bundle.manifest.output_kinds["logits"]) == ("LABEL_2", "single-label")


def test_sizes_that_no_config_says_are_asked_for(tmp_path: Path) -> None:
    source = detr(tmp_path / "detr")

    assert "--shape pixel_values" in fail("export", source, "-o", tmp_path / "b", "--use-transformers")
    options = ExportOptions(use_transformers=True, shape={"pixel_values": (3, 64, 96)})
    outputs = {
        spec.name: spec.shape for spec in export(source, tmp_path / "b", options).manifest.parts["model"].outputs
    }
    assert (outputs["logits"], outputs["pred_boxes"]) == ((1, 6, 3), (1, 6, 4))


def test_sizes_of_a_config_that_are_no_two_sides(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="labels"):
        load_model(vit, use_transformers=True, shape={"labels": (1,)})
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    net = saved(tmp_path / "net", "ResNetForImageClassification", transformers.ResNetConfig(**sizes))
    changed(image_size={"height": 32, "width": 48})(net)
    assert load_model(net, use_transformers=True).model.examples["pixel_values"].shape == (1, 3, 32, 48)
    for absurd in (10**9, {"shortest_edge": 24}, [24], "24"):
        changed(image_size=absurd)(net)
        with pytest.raises(UsageError, match="pixel_values"):
            load_model(net, use_transformers=True)


def test_a_model_of_several_texts(tmp_path: Path) -> None:
    parts: dict[str, Any] = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}
    config = transformers.MusicgenConfig(**parts, decoder={"model_type": "musicgen_decoder"})
    with pytest.raises(ValueError, match="text"):
        config.get_text_config()
    assert text_config(config) is config.text_encoder


def test_an_image_processor_that_is_not_known(vit: Path) -> None:
    path = vit / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "OwnImageProcessor"}))

    with pytest.raises(UnsupportedModelError, match="OwnImageProcessor") as raised:
        load_model(vit, use_transformers=True)
    assert "--task arrays" in raised.value.hint
    model = load_model(vit, use_transformers=True, task="arrays")
    assert model.run({"pixel_values": np.zeros((1, 3, 24, 24), np.float32)})["logits"].shape == (1, 3)


def test_a_perceiver_without_a_task(tmp_path: Path) -> None:
    """It takes a mask beside `inputs`, and has as many positions as texts, which it does not read."""
    heads: dict[str, Any] = {
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
        "num_self_attends_per_block": 1,
    }
    config = transformers.PerceiverConfig(num_latents=4, d_latents=8, d_model=6, num_blocks=1, **heads)
    source = saved(tmp_path / "perceiver", "PerceiverModel", config)
    bundle = export(source, tmp_path / "b", ExportOptions(use_transformers=True, shape={"inputs": (30, 6)}))

    (part,) = bundle.manifest.parts.values()
    assert {spec.name: spec.shape for spec in (*part.inputs, *part.outputs)} == {
        "inputs": (1, 30, 6),
        "last_hidden_state": (1, 4, 8),
    }


def changed(**fields: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def sharded(shard: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))

    return change


@pytest.mark.parametrize(
    ("change", "error", "datum"),
    [
        (changed(architectures=["BertForNothing"]), UnsupportedModelError, "BertForNothing"),
        (changed(architectures=["set_seed"]), UnsupportedModelError, "set_seed"),
        (changed(architectures=None), UnsupportedModelError, "''"),
        (changed(auto_map={"AutoModel": "code.Model"}), UnsupportedModelError, "auto_map"),
        (changed(nested=[{"attn_implementation": "owner/kernel"}]), UnsupportedModelError, "attn_implementation"),
        (changed(quantization_config={"load_in_8bit": True}), UnsupportedModelError, "quantization_config"),
        (changed(configuration_files=["config.4.0.0.json"]), UnsupportedModelError, "configuration_files"),
        (changed(experts_implementation="sonicmoe"), UnsupportedModelError, "experts_implementation"),
        (changed(_attn_implementation_internal={"": "hub"}), UnsupportedModelError, "_attn_implementation_internal"),
        (changed(vision={"backbone": "hf-hub:owner/model"}), UnsupportedModelError, "backbone"),
        (sharded("../outside.safetensors"), CheckpointError, "outside.safetensors"),
        (sharded("/outside.safetensors"), CheckpointError, "outside.safetensors"),
        (changed(architectures=["BertForMaskedLM"]), CheckpointError, "cls.predictions"),
        (changed(hidden_size=64), CheckpointError, "BertForSequenceClassification"),
        (lambda directory: (directory / "model.safetensors").unlink(), CheckpointError, "model.safetensors"),
        (lambda directory: (directory / "config.json").write_text("{"), CheckpointError, "config.json"),
    ],
)
def test_directories_that_are_refused(
    change: Callable[[Path], None], error: type[PerceiverExportError], datum: str, bert: Path, tmp_path: Path
) -> None:
    change(bert)
    with pytest.raises(error, match=datum) as raised:
        export(bert, tmp_path / "b", ExportOptions(use_transformers=True))
    assert raised.value.hint
    assert not (tmp_path / "b").exists()


def test_options_sources_and_an_absent_transformers(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        load_model(bert)
    assert "--use-transformers" in raised.value.hint
    for wrong in ({"parity": "deepmind"}, {"shape": {"image": (3, 8, 8)}}, {"config": "sizes.json"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            load_model(bert, use_transformers=True, **wrong)
    with pytest.raises(CheckpointError, match="preset:imagenet-conv"):
        load_model("preset:imagenet-conv", use_transformers=True)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="transformers"):
        load_model(bert, use_transformers=True)
