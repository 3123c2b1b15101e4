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
from .deepmind_reference import Array, arrays, sizes

Arrays = dict[str, Array]
Change = Callable[[dict[str, Any]], object]


def _load(name: str, path: Path, tmp_path: Path, changes: Change | str | None = None, shape: Any = None) -> None:
    """Load a pickle as the model ``name`` with its own sizes, changed, or with a text as its config."""
    config = tmp_path / "sizes.json"
    found = sizes(VECTORS / name.replace("-", "_"))
    if callable(changes):
        changes(found)
    config.write_text(changes if isinstance(changes, str) else json.dumps(found), encoding="utf-8")
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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("language", lambda params: params.pop(_VALUE), f"1 tensor is missing from the checkpoint: {_VALUE}"),
        ("language", _rename(_VALUE, f"{_VALUE}_"), f"{_VALUE} (nearest: {_VALUE}_)"),
        ("language", _set("perceiver_encoder/~/self_attention_9/extra/w", 2, 2), "self_attention_9/extra/w"),
        ("language", _set(_VALUE, 32, 31), "(32, 31) ((31, 32) in our layout), but the config asks for (32, 32)"),
        ("language", _set(_VALUE, 1024), "has shape (1024,), which does not fit its layer"),
        ("optical_flow", _set("image_preprocessor/patches_linear/w", 53, 32), "has shape (53, 32), which does not"),
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
        _load(name, path, tmp_path)
    assert message in error.value.message
    assert "--config" in error.value.hint


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_and_infinity(value: float, dtype: type, tmp_path: Path) -> None:
    path = _pickle("language", tmp_path, lambda params: params.update({_VALUE: np.full((32, 32), value, dtype)}))

    with pytest.raises(CheckpointError, match=f"{_VALUE}' holds NaN or infinite values"):
        load_model(f"deepmind:language:{path}")


def _sized(part: str, **values: Any) -> Change:
    return lambda found: found[part].update(values)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (_sized("encoder", num_layers=3), CheckpointError, "`num_layers`"),
        (_sized("encoder", num_blocks=0), CheckpointError, "`$.encoder.num_blocks`"),
        (_sized("encoder", num_blocks="two"), CheckpointError, "`$.encoder.num_blocks`"),
        (_sized("encoder", cross_attention={"num_heads": 5}), UsageError, "cannot be split into 5 heads"),
        (_sized("encoder", num_latents=9), CheckpointError, "the config asks for (9, 32)"),
        (_sized("inputs", image={"height": 4}), CheckpointError, "`$.inputs"),
        (_sized("inputs", tokens=None), UsageError, "no inputs"),
        ("{", CheckpointError, "sizes.json"),
        ("[]", CheckpointError, "sizes.json"),
    ],
)
def test_sizes_that_do_not_fit(
    changes: Change | str, kind: type[PerceiverExportError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as error:
        _load("language", VECTORS / "language" / "checkpoint.pickle", tmp_path, changes)
    assert message in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("spec", "kind", "message", "hint"),
    [
        ("optical_flo:{}", UsageError, "no released model 'optical_flo'", "did you mean optical-flow?"),
        ("{}", UsageError, "no released model", "TASK one of language, imagenet-learned"),
        ("language", UsageError, "no checkpoint file is given", "deepmind:language:FILE"),
        ("language:", UsageError, "no checkpoint file is given", "deepmind:language:FILE"),
        ("optical-flow:{}", CheckpointError, "holds the model language, not optical-flow", "deepmind:language:"),
        ("language:{}.missing", CheckpointError, "does not exist", "give"),
    ],
)
def test_sources_that_name_no_checkpoint(spec: str, kind: type[PerceiverExportError], message: str, hint: str) -> None:
    with pytest.raises(kind) as error:
        load_model(f"deepmind:{spec.format(VECTORS / 'language' / 'checkpoint.pickle')}")
    assert message in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize("name", ["imagenet_learned", "imagenet_fourier", "imagenet_conv", "video_autoencoding"])
def test_models_are_told_from_one_another(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"holds the model {name.replace('_', '-')}, not language"):
        load_model(f"deepmind:language:{VECTORS / name / 'checkpoint.pickle'}")


def test_only_sizes_of_images_can_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="optical-flow"):
        _load("optical-flow", VECTORS / "optical_flow" / "checkpoint.pickle", tmp_path, shape={"image": (3, 16, 24)})
    with pytest.raises(UsageError, match="3 channels, not 1"):
        _load("imagenet_conv", VECTORS / "imagenet_conv" / "checkpoint.pickle", tmp_path, shape={"image": (1, 16, 24)})


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json"):
        load_model(f"deepmind:language:{VECTORS / 'language' / 'checkpoint.pickle'}", config=tmp_path / "none.json")
