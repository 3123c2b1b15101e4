# SPDX-License-Identifier: Apache-2.0
"""Our models of DeepMind's pickles are DeepMind's to rounding, inside and out; one wrong detail, and they are not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from perceiver_export.exporter.model.config import PerceiverConfig
from tests.vector_folders import VECTORS

from .deepmind_reference import Array, Change, arrays, facts, model_folders, tolerance
from .deepmind_runs import computed, with_both_ends

FOLDERS = model_folders()
NAMES = ("imagenet_conv", "imagenet_fourier", "imagenet_learned", "language", "optical_flow", "video_autoencoding")


def _name(value: object) -> str:
    return f"{value.parent.name}-{value.name}" if isinstance(value, Path) else str(value)


def _recorded(file: str) -> list[tuple[Path, str]]:
    """Every value that a model gives, of every folder."""
    return [
        (folder, key)
        for folder in FOLDERS
        for key in arrays(folder, file)
        if not key.startswith("in/") and "/points_" not in key
    ]


@functools.cache
def _ours(folder: Path, dtype: torch.dtype) -> dict[str, Array]:
    return computed(folder, dtype)


def test_all_six_models_are_here() -> None:
    assert [folder.name for folder in FOLDERS if folder.parent == VECTORS] == list(NAMES)


@pytest.mark.parametrize(("folder", "key"), _recorded("io.npz"), ids=_name)
def test_single_precision(folder: Path, key: str) -> None:
    expected, found = arrays(folder)[key], _ours(folder, torch.float32)[key]

    assert found.shape == expected.shape
    if expected.dtype.kind != "f":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(folder, key))


@pytest.mark.parametrize(("folder", "key"), _recorded("io_f64.npz"), ids=_name)
def test_double_precision(folder: Path, key: str) -> None:
    expected, found = arrays(folder, "io_f64.npz")[key], _ours(folder, torch.float64)[key]

    # DeepMind computes Fourier positions in float32 always; without them there is nothing left but rounding.
    exact = facts(folder)["name"] in ("language", "imagenet_learned")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 if exact else tolerance(folder, key))


def _encoder(**changes: Any) -> Change:
    return lambda config: replace(config, encoder=replace(config.encoder, **changes))


def _attention(part: str, layer: str, **changes: Any) -> Change:
    def change(config: PerceiverConfig) -> PerceiverConfig:
        whole: Any = getattr(config, part)
        return replace(config, **{part: replace(whole, **{layer: replace(getattr(whole, layer), **changes)})})

    return change


def _inputs(**changes: Any) -> Change:
    """Changes of every input that has positions, or of its positions."""

    def changed(one: Any) -> Any:
        if not hasattr(one, "positions"):
            return one
        own = {name: value for name, value in changes.items() if hasattr(one, name)}
        rest = {name: value for name, value in changes.items() if name not in own}
        return replace(one, **own, **({"positions": replace(one.positions, **rest)} if rest else {}))

    return lambda config: replace(config, inputs={name: changed(one) for name, one in config.inputs.items()})


def _without_scale(config: PerceiverConfig) -> PerceiverConfig:
    decoder: Any = config.decoder
    outputs = {name: replace(one, scale=one.scale / 20) for name, one in decoder.outputs.items()}
    return replace(config, decoder=replace(decoder, outputs=outputs))


def _flipped_residual(config: PerceiverConfig) -> PerceiverConfig:
    decoder: Any = config.decoder
    return _attention("decoder", "cross_attention", query_residual=not decoder.cross_attention.query_residual)(config)


_FOURIER = ("imagenet_fourier", "imagenet_conv", "optical_flow", "video_autoencoding")
MISTAKES: dict[str, tuple[tuple[str, ...], Change]] = {
    "exact GELU": (NAMES, lambda config: replace(config, activation="gelu")),
    "no residual in the encoder": (NAMES, _attention("encoder", "cross_attention", query_residual=False)),
    "the other residual in the decoder": (NAMES, _flipped_residual),
    "other heads": (NAMES, _attention("encoder", "self_attention", num_heads=2)),
    "one block more": (NAMES, _encoder(num_blocks=3)),
    "masked queries read": (("language",), lambda config: replace(config, mask_queries=False)),
    "transformers' padding": (("imagenet_conv",), _inputs(padding="huggingface")),
    "positions without the last": (_FOURIER, _inputs(endpoint=False)),
    "flow not times 20": (("optical_flow",), _without_scale),
    "queries with the last": (("video_autoencoding",), with_both_ends),
}


@pytest.mark.parametrize(
    ("name", "mistake"), [(name, mistake) for mistake, (names, _) in MISTAKES.items() for name in names]
)
def test_one_wrong_detail_shows(name: str, mistake: str) -> None:
    assert _is_wrong(VECTORS / name, computed(VECTORS / name, change=MISTAKES[mistake][1]))


def test_latents_of_a_text_without_any_token_read_zeros() -> None:
    folder, key = VECTORS / "language", "mid/latents"  # no output shows it: all its queries are masked as well
    wrong = computed(folder, change=lambda config: replace(config, masked_rows="mean"))

    differences = np.abs(wrong[key] - arrays(folder)[key]).max(axis=(1, 2))
    empty = arrays(folder)["in/input_mask"].max(axis=1) == 0
    assert empty.any()
    assert ((differences > 4 * tolerance(folder, key)) == empty).all()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_numerics_are_not_deepminds(name: str) -> None:
    assert _is_wrong(VECTORS / name, computed(VECTORS / name, parity="huggingface"))


def _is_wrong(folder: Path, found: dict[str, Array]) -> bool:
    """Whether some output is outside its tolerance, as far as the README says of every mistake."""
    outputs = [key for key in arrays(folder) if key.startswith("out/") and key.count("/") == 1]
    return any(np.abs(found[key] - arrays(folder)[key]).max() > 4 * tolerance(folder, key) for key in outputs)
