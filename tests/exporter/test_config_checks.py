# SPDX-License-Identifier: Apache-2.0
"""Own configs that contradict themselves are refused with what is wrong, before torch builds anything."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from perceiver_export.exporter.graphs import GraphPart
from perceiver_export.exporter.model.architectures import (
    EncoderSizes,
    image_input,
    language_model,
    own_model,
    set_transformer,
)
from perceiver_export.exporter.model.config import (
    ArrayInput,
    AttentionConfig,
    AverageDecoder,
    FourierPositions,
    FramePairInput,
    GivenQueries,
    ImageInput,
    Input,
    InputQueries,
    LearnedPositions,
    LearnedQueries,
    MaskedInput,
    OutputConfig,
    PerceiverConfig,
    PositionQueries,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.exporter.trace import folded_graph
from perceiver_export.runtimes.errors import ExportError, UsageError
from perceiver_export.runtimes.manifest import TensorSpec

ENCODER = EncoderSizes(6, 16, num_self_attentions_per_block=1, num_blocks=2, num_self_attention_heads=4)
CLASSES = OutputConfig(LearnedQueries(1, 16), (2,), 2)
ARRAY = ArrayInput((5,), 3)
PLANE = FourierPositions(2, (8, 8))
TOKENS = TokenInput(50, 6, 8)


def model(one: Input = ARRAY, output: OutputConfig = CLASSES, **encoder: Any) -> PerceiverConfig:
    config = own_model({"x": one}, {"y": output}, ENCODER)
    return replace(config, encoder=replace(config.encoder, **encoder))


def with_decoder(config: PerceiverConfig, **changes: Any) -> PerceiverConfig:
    assert isinstance(config.decoder, QueryDecoder)
    return replace(config, decoder=replace(config.decoder, **changes))


def language(**changes: Any) -> PerceiverConfig:
    config = language_model(TOKENS, ENCODER, AttentionConfig(1, 8, 8), "deepmind")
    return replace(config, **changes)


def test_what_the_tests_change_is_right() -> None:
    for config in (model(), language(), set_transformer(5, 3, 4, ENCODER, "deepmind")):
        assert PerceiverIO(config).eval().config == config


@pytest.mark.parametrize("name", ["values", "type", "keys", "training", "get", "latents", "x_mask", "a.b", ""])
def test_names_that_torch_or_a_bundle_has_taken(name: str) -> None:
    average = replace(model(), decoder=AverageDecoder(2, output=name))
    for config in (
        own_model({name: ARRAY}, {"y": CLASSES}, ENCODER),
        own_model({"x": ARRAY}, {name: CLASSES}, ENCODER),
    ):
        with pytest.raises(UsageError, match="cannot name an input"):
            PerceiverIO(config)
    with pytest.raises(UsageError, match="cannot name"):
        PerceiverIO(average)


INPUTS: dict[str, tuple[Callable[[], Input], str]] = {
    "no axes": (lambda: ArrayInput((), 3), "shape"),
    "nothing along an axis": (lambda: ArrayInput((0,), 3), "shape"),
    "negative": (lambda: ArrayInput((-5,), 3), "shape"),
    "no channels": (lambda: ArrayInput((5,), 0), "num_channels"),
    "patches of nothing": (lambda: ArrayInput((4,), 3, patch=(0,)), "patch"),
    "patches the other way": (lambda: ArrayInput((4,), 3, patch=(-2,)), "patch"),
    "too many patches": (lambda: ArrayInput((4,), 3, patch=(2, 2)), r"patches of \(2, 2\) do not divide"),
    "another table": (lambda: ArrayInput((5,), 3, positions=LearnedPositions((8,), 4)), r"\(5,\) patches.* of \(8,\)"),
    "a table of pixels, not patches": (
        lambda: ArrayInput((8,), 3, patch=(2,), positions=LearnedPositions((8,), 4)),
        r"\(4,\) patches.* of \(8,\)",
    ),
    "an empty table": (lambda: ArrayInput((5,), 3, positions=LearnedPositions((5,), 0)), "num_table_channels"),
    "no bands": (lambda: ArrayInput((5,), 3, positions=FourierPositions(-1, (5.0,))), "num_bands"),
    "no resolution": (lambda: ArrayInput((5,), 3, positions=FourierPositions(2, (float("nan"),))), "max_resolution"),
    "a picture with one axis": (
        lambda: ImageInput(3, 8, 8, "pixels", 3, FourierPositions(4, (8,))),
        "2 axes has positions of 1",
    ),
    "a picture with a line of positions": (
        lambda: ImageInput(3, 8, 8, "conv1x1", 4, LearnedPositions((64,), 4)),
        "2 axes has positions of 1",
    ),
    "more features than pixels": (lambda: ImageInput(3, 8, 8, "pixels", 5, PLANE), "num_feature_channels is 5"),
    "a picture without rows": (lambda: ImageInput(3, 0, 8, "pixels", 3, PLANE), "height"),
    "a picture without channels": (lambda: ImageInput(0, 8, 8, "pixels", 0, PLANE), "num_channels"),
    "a picture that the pool swallows": (lambda: ImageInput(3, 4, 8, "conv", 8, PLANE), "4 × 8"),
    "frames with one axis": (lambda: FramePairInput(8, 8, 4, FourierPositions(2, (8,))), "2 axes has positions of 1"),
    "no tokens": (lambda: TokenInput(0, 6, 8), "vocabulary_size"),
    "no text": (lambda: TokenInput(50, 0, 8), "length"),
    "nothing masked": (lambda: MaskedInput(0, 8), "num_inputs"),
    "only what is masked": (lambda: MaskedInput(3, 4), "those that are always masked"),
    "more than any memory": (lambda: ArrayInput((10**6, 10**6), 3), "more than"),
    "a table larger than any memory": (
        lambda: ImageInput(3, 8, 8, "conv1x1", 4, LearnedPositions((10**6, 10**6), 4)),
        "4,000,000,000,000",
    ),
    "not a number": (lambda: ArrayInput((5,), "3"), "Expected `int`"),  # type: ignore[arg-type]
    "an unknown word": (lambda: ImageInput(3, 8, 8, "fourier", 3, PLANE), "'fourier'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_are_none(name: str) -> None:
    make, message = INPUTS[name]

    with pytest.raises(UsageError, match=message) as caught:
        replace(model(), inputs={"x": make()}, num_input_channels=64)
    assert caught.value.hint


def grid_queries(shape: tuple[int, ...], resolution: tuple[float, ...], num_rows: int) -> OutputConfig:
    return OutputConfig(PositionQueries(shape, FourierPositions(2, resolution)), (num_rows, 2), 2)


CONFIGS: dict[str, tuple[Callable[[], PerceiverConfig], str]] = {
    "no inputs": (lambda: replace(model(), inputs={}), "no inputs"),
    "no latents": (lambda: model(num_latents=0), "num_latents"),
    "no latent channels": (lambda: model(num_latent_channels=0), "num_latent_channels"),
    "no blocks": (lambda: model(num_blocks=0), "num_blocks"),
    "less than no layers": (lambda: model(num_self_attentions_per_block=-1), "num_self_attentions_per_block"),
    "nothing is read": (lambda: model(num_cross_attentions=0), "num_cross_attentions"),
    "more reading than blocks": (lambda: model(num_cross_attentions=3), "3 cross-attentions and 2 blocks"),
    "no heads": (lambda: model(cross_attention=AttentionConfig(0, 16, 16)), "num_heads"),
    "heads that do not divide": (lambda: model(self_attention=AttentionConfig(3, 16, 16)), "16 .* into 3 heads"),
    "no values": (lambda: model(self_attention=AttentionConfig(4, 16, 0)), "num_v_channels"),
    "an MLP of nothing": (lambda: model(self_attention=AttentionConfig(4, 16, 16, 0)), "widening_factor"),
    "an unknown sharing": (lambda: model(block_sharing="some"), "'some'"),
    "too few input queries": (
        lambda: model(ARRAY, OutputConfig(InputQueries(4, 3), (4, 3))),
        "4 × 3 inputs as queries, but there are 5 × 3",
    ),
    "narrow input queries": (
        lambda: model(ARRAY, OutputConfig(InputQueries(5, 2), (5, 2))),
        "5 × 2 inputs as queries, but there are 5 × 3",
    ),
    "no queries": (lambda: model(ARRAY, OutputConfig(GivenQueries(0, 3), (0, 3))), "num_queries"),
    "a grid without axes": (lambda: model(ARRAY, grid_queries((), (1,), 1)), "shape"),
    "a negative grid": (lambda: model(ARRAY, grid_queries((-2, -2), (2, 2), 4)), "shape"),
    "a grid of two axes": (lambda: model(ARRAY, grid_queries((2, 2), (4,), 4)), "2 axes has positions of 1"),
    "more queries than memory": (
        lambda: model(ARRAY, grid_queries((10**6, 10**6), (4, 4), 10**12)),
        "more than",
    ),
    "an output of nothing": (lambda: model(ARRAY, OutputConfig(LearnedQueries(1, 16), (-2, -1), 2)), "shape"),
    "no classes": (lambda: replace(model(), decoder=AverageDecoder(0)), "num_output_channels"),
    "less than no channels": (lambda: with_decoder(model(), num_output_channels=-2), "num_output_channels"),
    "an embedding of another width": (lambda: with_decoder(language(), num_output_channels=3), "3 channels, but its"),
    "a mask for other queries": (
        lambda: with_decoder(language(), outputs={"y": OutputConfig(LearnedQueries(1, 8), (50,))}),
        "1 queries for 6 inputs",
    ),
    "a mask that there is not": (lambda: replace(model(), mask_queries=True), "no input has a mask"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_contradict_themselves(name: str) -> None:
    make, message = CONFIGS[name]

    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert caught.value.hint


@pytest.mark.parametrize("padding", ["same", "huggingface"])
def test_the_grid_behind_a_convolution_is_what_torch_makes(padding: Any) -> None:
    for side in range(5, 25):
        image = ImageInput(3, side, 2 * side, "conv", 4, PLANE, padding)
        network = PerceiverIO(model(image)).eval()
        with torch.no_grad():
            inputs, _ = network.embed({"x": torch.zeros(1, 3, side, 2 * side)})
        assert inputs.shape[1] == image.num_inputs


def test_the_picture_inputs_of_the_papers_ask_too() -> None:
    with pytest.raises(UsageError, match="2 × 2") as caught:
        image_input("conv", 2, 2, "huggingface", (56, 56))
    assert "5 or more" in (caught.value.hint or "")
    assert image_input("conv", 2, 2, "deepmind", (56, 56)).grid == (1, 1)


class Untraceable(nn.Module):
    """Fails as torch does: deep inside, with a page of advice."""

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.matmul(tensors[0], tensors[0]),)


def test_a_model_that_torch_cannot_trace(capfd: pytest.CaptureFixture[str]) -> None:
    spec = TensorSpec("x", "float32", (3, 4), "", {})
    before = logging.root.manager.disable

    with pytest.raises(ExportError, match="cannot trace this model: RuntimeError: ") as caught:
        folded_graph(GraphPart("model", Untraceable(), (spec,), (spec,), {}), model(), fold=True, budget=1 << 30)

    assert "[3, 4]" in caught.value.message
    assert "\x1b" not in caught.value.message
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == before


def test_coordinates_are_not_projected() -> None:
    """Their Fourier features are the inputs; a projection beside would be taken for the features' own basis."""
    positions = FourierPositions(2, (8.0, 8.0))
    with pytest.raises(UsageError, match="do not fit value_positions"):
        ArrayInput((9,), 2, value_positions=positions, num_projected_channels=30)
