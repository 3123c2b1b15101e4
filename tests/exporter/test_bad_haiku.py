# SPDX-License-Identifier: Apache-2.0
"""Haiku pickles that are of another model, lack something, or come with sizes that are not theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.exporter import load_model
from perceiver_export.runtimes.errors import CheckpointError, PerceiverExportError, UsageError
from tests.vector_folders import VECTORS

from . import haiku_writer
from .deepmind_reference import Array, arrays, flags

Arrays = dict[str, Array]


def _load(name: str, path: Path, tmp_path: Path, changes: dict[str, Any] | str, shape: Any = None) -> None:
    """Load a pickle as the model ``name`` with its own sizes but for ``changes`` (or with a text as its config)."""
    config = tmp_path / "sizes.json"
    sizes = {key: value for key, value in flags(VECTORS / name).items() if key != "spatial_patch"}
    text = changes if isinstance(changes, str) else json.dumps({**sizes, **changes})
    config.write_text(text, encoding="utf-8")
    load_model(f"deepmind:{name}:{path}", config=config, shape=shape)


def _pickle(name: str, tmp_path: Path, change: Callable[[Arrays], object]) -> Path:
    """The vectors' parameters with a change."""
    tree: dict[str, dict[str, object]] = {}
    params = dict(arrays(VECTORS / name, "params.npz"))
    change(params)
    for full, array in params.items():
        module, _, parameter = full.rpartition("/")
        tree.setdefault(module, {})[parameter] = array
    return haiku_writer.write(tmp_path / "changed.pickle", haiku_writer.flat_mappings(tree))


def _rename(old: str, new: str) -> Callable[[Arrays], object]:
    return lambda params: params.update({new: params.pop(old)})


def _set(name: str, *shape: int) -> Callable[[Arrays], object]:
    return lambda params: params.update({name: np.zeros(shape, np.float32)})


_VALUE = "perceiver_encoder/~/self_attention_1/attention/linear_2/w"
_CROSS_VALUE = "perceiver_encoder/~/cross_attention/attention/linear_2/w"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("language", lambda params: params.pop(_VALUE), f"1 tensor is missing from the checkpoint: {_VALUE}"),
        ("language", _rename(_VALUE, f"{_VALUE}_"), f"{_VALUE} (nearest: {_VALUE}_)"),
        ("language", _set("perceiver_encoder/~/self_attention_9/extra/w", 2, 2), "self_attention_9/extra/w"),
        ("language", _rename(_CROSS_VALUE, f"{_CROSS_VALUE}_"), f"no parameter '{_CROSS_VALUE}' (nearest: "),
        ("language", lambda params: params.pop("embed/embeddings"), "no parameter 'embed/embeddings'"),
        ("language", _set(_VALUE, 32, 31), "has shape (32, 31) ((31, 32) in our layout), the config asks for (32, 32)"),
        ("language", _set(_VALUE, 1024), "has shape (1024,), which is not that of its layer"),
        ("language", _set(_CROSS_VALUE, 768), "has shape (768,), not 2 axes"),
        ("language", _set("embed/embeddings", 0, 24), "has shape (0, 24), not 2 axes"),
        ("optical_flow", _set("image_preprocessor/patches_linear/w", 54, 31), "leave 27 for Fourier positions"),
        ("optical_flow", _set("image_preprocessor/patches_linear/w", 53, 32), "has shape (53, 32), which is not"),
        ("video_autoencoding", _set("multimodal_preprocessor/audio_padding/pos_embs", 1, 60), "leave 0 for Fourier"),
        ("video_autoencoding", _set("multimodal_preprocessor/image_padding/pos_embs", 1, 9), "has 46 values"),
        (
            "video_autoencoding",
            lambda params: params.pop("encoder/~/cross_attention/layer_norm/scale"),
            "is missing from the checkpoint",
        ),
    ],
)
def test_parameters_that_do_not_fit(
    name: str, change: Callable[[Arrays], object], message: str, tmp_path: Path
) -> None:
    path = _pickle(name, tmp_path, change)

    with pytest.raises(CheckpointError) as error:
        _load(name, path, tmp_path, {})
    assert message in error.value.message
    assert "model" in error.value.hint


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("language", {"num_layers": 3}, "`num_layers`"),
        ("language", {"num_blocks": 0}, "`$.num_blocks`"),
        ("language", {"num_blocks": "two"}, "`$.num_blocks`"),
        ("language", {"num_self_attention_heads": 5}, "cannot be split into 5 heads"),
        ("language", {"num_decoder_heads": 7}, "cannot be split into 7 heads"),
        ("language", "{", "sizes.json"),
        ("language", "[]", "sizes.json"),
        ("imagenet_learned", {"image_size": [12, 15]}, "has 192 positions, a picture of 12 × 15 has 180"),
        ("imagenet_learned", {"image_size": None}, "has 192 positions, a picture of 13 × 13 has 169"),
        ("imagenet_learned", {"max_resolution": [12, 16]}, "`max_resolution`"),
        ("imagenet_fourier", {"image_size": [16]}, "`$.image_size`"),
        ("imagenet_fourier", {"image_size": [16, 1 << 20]}, "`$.image_size[1]`"),
        ("imagenet_fourier", {"max_resolution": [16, 0]}, "`$.max_resolution[1]`"),
        ("optical_flow", {"min_overlap": 16}, "min_overlap is 16, train_size [16, 24]"),
        ("video_autoencoding", {"spatial_patch": 1}, "less 3 of features and 7 of padding leave 66"),
        ("video_autoencoding", {"spatial_patch": 3}, "frames of 16 × 16 have no whole number of patches of 3 × 3"),
        ("video_autoencoding", {"num_samples": 120}, "120 samples are no whole number of patches of 16"),
    ],
)
def test_sizes_that_do_not_fit(name: str, changes: dict[str, Any] | str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        _load(name, VECTORS / name / "checkpoint.pickle", tmp_path, changes)
    assert message in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("spec", "kind", "message", "hint"),
    [
        ("optical_flo:{}", UsageError, "no released model 'optical_flo'", "did you mean optical-flow?"),
        ("{}", UsageError, "no released model", "TASK one of language, imagenet-learned"),
        ("language", UsageError, "no checkpoint file is given", "deepmind:language:FILE"),
        ("language:", UsageError, "no checkpoint file is given", "deepmind:language:FILE"),
        ("optical-flow:{}", CheckpointError, "holds a model of language, not of optical-flow", "deepmind:language:"),
        ("language:{}.missing", CheckpointError, "No such file", "give"),
    ],
)
def test_sources_that_name_no_checkpoint(spec: str, kind: type[PerceiverExportError], message: str, hint: str) -> None:
    with pytest.raises(kind) as error:
        load_model(f"deepmind:{spec.format(VECTORS / 'language' / 'checkpoint.pickle')}")
    assert message in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize("name", ["imagenet_learned", "imagenet_fourier", "imagenet_conv", "video_autoencoding"])
def test_models_are_told_from_one_another(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"holds a model of {name.replace('_', '-')}, not of language"):
        load_model(f"deepmind:language:{VECTORS / name / 'checkpoint.pickle'}")


def test_sizes_of_pictures_only_can_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="input sizes of optical-flow"):
        _load("optical_flow", VECTORS / "optical_flow" / "checkpoint.pickle", tmp_path, {}, {"image": (3, 16, 24)})
    with pytest.raises(CheckpointError, match="the picture has 1 channels"):
        _load("imagenet_conv", VECTORS / "imagenet_conv" / "checkpoint.pickle", tmp_path, {}, {"image": (1, 16, 24)})


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json"):
        load_model(f"deepmind:language:{VECTORS / 'language' / 'checkpoint.pickle'}", config=tmp_path / "none.json")
