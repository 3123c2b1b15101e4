# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints, made by transformers itself."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from perceiver_export.exporter import ExportOptions, LoadedModel, export, load_model
from perceiver_export.runtimes import Bundle, open_bundle
from tests.conftest import MadeOnce

# The class, and the sizes that differ from the common ones; odd where an odd size is possible.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned": ("PerceiverForImageClassificationLearned", {"d_model": 512}),
    "fourier": ("PerceiverForImageClassificationFourier", {"d_model": 261}),
    "conv": ("PerceiverForImageClassificationConvProcessing", {"d_model": 322}),
    "language": (
        "PerceiverForMaskedLM",
        {"d_model": 40, "max_position_embeddings": 19, "qk_channels": 8, "v_channels": 24},
    ),
    "text": ("PerceiverForSequenceClassification", {"d_model": 20, "max_position_embeddings": 13}),
    "flow": ("PerceiverForOpticalFlow", {"d_model": 322, "train_size": [11, 14]}),
    "video": (
        "PerceiverForMultimodalAutoencoding",
        {
            "d_model": 405,
            "num_frames": 3,
            "image_size": 5,
            "output_shape": [1, 3, 20, 20],
            "audio_samples_per_frame": 48,
            "output_num_channels": 22,
        },
    ),
}


def make_transformers_model(kind: str, **changes: Any) -> Any:
    """A transformers Perceiver with every parameter and buffer away from its default."""
    import transformers

    name, own_sizes = KINDS[kind]
    sizes: dict[str, Any] = {
        "num_latents": 7,
        "d_latents": 24,
        "num_blocks": 2,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
        "image_size": 12,
        "num_labels": 5,
        **own_sizes,
    }
    config = transformers.PerceiverConfig(**{**sizes, **changes})
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moved(getattr(transformers, name)(config).eval())


def moved(model: Any) -> Any:
    """The model with random numbers added to every parameter and buffer."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    return model


MakeCheckpoint = Callable[..., Path]
ExportKind = Callable[[str, str], Bundle]
TracedOnce = Callable[[str, Callable[[], ir.Model]], ir.Model]
# Every block is the same layer, twice: graphs of more layers differ in nothing but their length.
SHALLOW = {"num_self_attends_per_block": 1}
PICTURES = {"learned": (12, 12), "fourier": (13, 17), "conv": (37, 30)}  # height and width
ONE_QUERY = ["fourier", "text"]
OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {"split": False, "batch": 2},
    "split": {"split": True, "batch": 2},
    "split, dynamic": {"split": True, "batch": "1:2:4", "dynamic_queries": True},
}


@pytest.fixture
def make_checkpoint(tmp_path: Path, made_once: MadeOnce) -> MakeCheckpoint:
    """``make_checkpoint(kind, save_options={}, **config)`` -> a Hugging Face directory of the test's own."""

    def make(kind: str, save_options: dict[str, Any] | None = None, **changes: Any) -> Path:
        options = json.dumps([save_options, changes], sort_keys=True, default=str)
        made = made_once(
            f"checkpoint-{kind}-{hashlib.sha256(options.encode()).hexdigest()[:16]}",
            lambda path: make_transformers_model(kind, **changes).save_pretrained(path, **(save_options or {})),
        )
        return Path(shutil.copytree(made, tmp_path / f"checkpoint-{kind}", dirs_exist_ok=True))

    return make


@pytest.fixture
def export_kind(make_checkpoint: MakeCheckpoint, made_once: MadeOnce) -> ExportKind:
    """Bundles by kind and name of options, each made once; do not change them."""

    def make(kind: str, name: str) -> Bundle:
        options = dict(OPTIONS[name])
        shape: dict[str, tuple[int, ...]] = {"image": (3, *PICTURES[kind])} if kind in PICTURES else {}
        if kind in ONE_QUERY:
            options.pop("dynamic_queries", None)  # refused where there is nothing to choose from
        elif options["split"]:
            shape["queries"] = (7,)
        every = ExportOptions(shape=shape, **options)
        place = f"transformers-{kind}-{name}"
        return open_bundle(made_once(place, lambda path: export(make_checkpoint(kind, **SHALLOW), path, every)))

    return make


@pytest.fixture(scope="session")
def traced_once(made_once: MadeOnce) -> TracedOnce:
    """``traced_once(name, trace)``: the graph ``name``, traced by ``trace()`` for all tests of all workers."""

    def graph(name: str, trace: Callable[[], ir.Model]) -> ir.Model:
        def save(folder: Path) -> None:
            folder.mkdir()
            ir.save(trace(), folder / "model.onnx")

        return ir.load(made_once(f"traced {name}", save) / "model.onnx")

    return graph


@pytest.fixture
def one_layer(make_checkpoint: MakeCheckpoint) -> LoadedModel:
    """The smallest image classifier."""
    checkpoint = make_checkpoint("fourier", num_blocks=1, num_self_attends_per_block=1)
    return load_model(checkpoint, shape={"image": (3, 8, 8)})
