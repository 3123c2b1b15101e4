# SPDX-License-Identifier: Apache-2.0
"""Our configs of perceiver-io's four models. What follows from widths that its config leaves out is decided here."""

from __future__ import annotations

from perceiver_export.exporter.checkpoints.krasserm_config import (
    ClassDecoder,
    Encoder,
    ImageClassifier,
    ImageEncoder,
    KrassermModel,
    MaskedLanguageModel,
    OpticalFlow,
    TextDecoder,
)
from perceiver_export.exporter.perceiver.architectures import VOCABULARY_SIZE, fourier
from perceiver_export.exporter.perceiver.config import (
    ArrayInput,
    AttentionConfig,
    EncoderConfig,
    FramePairInput,
    ImageInput,
    Input,
    InputQueries,
    LearnedQueries,
    OutputConfig,
    PerceiverConfig,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.runtimes.errors import CheckpointError

_RGB = 3
_FLOW_TARGETS = 20  # the network learns pixels / 20, as DeepMind's does


def task_of(model: KrassermModel) -> str:
    """What a bundle of the model does; arrays where its pictures have no colours, or its tokens are no bytes."""
    if isinstance(model, OpticalFlow):
        return "optical-flow"
    if isinstance(model, ImageClassifier):
        return "image-classification" if model.encoder.image_shape[2] == _RGB else "arrays"
    if model.encoder.vocab_size != VOCABULARY_SIZE:
        return "arrays"
    if isinstance(model, MaskedLanguageModel):
        return "fill-mask"
    return "text-classification" if model.decoder.num_output_queries == 1 else "arrays"


def text_length(model: KrassermModel) -> int:
    """The longest text: a language model has positions for the inputs and queries for the outputs."""
    if isinstance(model, MaskedLanguageModel):
        return min(model.encoder.max_seq_len, model.decoder.max_seq_len)
    assert not isinstance(model, (ImageClassifier, OpticalFlow))
    return model.encoder.max_seq_len


def architecture(model: KrassermModel) -> PerceiverConfig:
    """Our config of the model. Raises CheckpointError: heads that do not divide their channels."""
    one: Input
    if isinstance(model, OpticalFlow):
        name, one = "frames", _frames(model)
    elif isinstance(model, ImageClassifier):
        name, one = "image", _image(model.encoder)
    else:
        name = "tokens"
        one = TokenInput(model.encoder.vocab_size, text_length(model), model.encoder.num_input_channels)
    channels = one.num_input_channels
    return PerceiverConfig(
        inputs={name: one},
        num_input_channels=channels,
        encoder=_encoder(model, channels),
        decoder=_decoder(model, channels),
    )


def _image(encoder: ImageEncoder) -> Input:
    height, width, channels = encoder.image_shape
    positions = fourier(encoder.num_frequency_bands, (height, width), "huggingface")
    if channels == _RGB:
        return ImageInput(channels, height, width, "pixels", channels, positions)
    return ArrayInput((height, width), channels, positions=positions)


def _frames(model: OpticalFlow) -> FramePairInput:
    encoder = model.encoder
    positions = fourier(encoder.num_frequency_bands, encoder.image_shape, "huggingface")
    return FramePairInput(*encoder.image_shape, encoder.num_patch_hidden_channels, positions)


def _encoder(model: KrassermModel, num_input_channels: int) -> EncoderConfig:
    encoder, num_channels = model.encoder, model.num_latent_channels
    shared = encoder.first_cross_attention_layer_shared or encoder.num_cross_attention_layers == 1
    return EncoderConfig(
        num_latents=model.num_latents,
        num_latent_channels=num_channels,
        num_blocks=encoder.num_self_attention_blocks,
        num_self_attentions_per_block=encoder.num_self_attention_layers_per_block,
        cross_attention=_cross_attention(model, num_input_channels),
        self_attention=_attention(
            "self_attention of the encoder",
            encoder.num_self_attention_heads,
            encoder.num_self_attention_qk_channels or num_channels,
            encoder.num_self_attention_v_channels,
            encoder.self_attention_widening_factor,
        ),
        num_cross_attentions=encoder.num_cross_attention_layers,
        cross_attention_sharing="all" if shared else "all-but-first",
        block_sharing="all" if encoder.first_self_attention_block_shared else "all-but-first",
    )


def _cross_attention(model: KrassermModel, num_input_channels: int) -> AttentionConfig:
    """Of pictures it is as wide as they are where nothing is said, of texts as wide as the latents."""
    encoder: Encoder = model.encoder
    of_pictures = isinstance(model, (ImageClassifier, OpticalFlow))
    v_channels = encoder.num_cross_attention_v_channels
    if isinstance(model, OpticalFlow):
        v_channels = v_channels or num_input_channels
    return _attention(
        "cross_attention of the encoder",
        encoder.num_cross_attention_heads,
        encoder.num_cross_attention_qk_channels or (num_input_channels if of_pictures else model.num_latent_channels),
        v_channels,
        encoder.cross_attention_widening_factor,
    )


def _decoder(model: KrassermModel, num_input_channels: int) -> QueryDecoder:
    decoder = model.decoder
    name, output, num_output_channels, tied = _output(model, num_input_channels)
    width = output.queries.num_channels
    return QueryDecoder(
        outputs={name: output},
        num_query_channels=width,
        cross_attention=_attention(
            "cross_attention of the decoder",
            decoder.num_cross_attention_heads,
            decoder.num_cross_attention_qk_channels or width,
            decoder.num_cross_attention_v_channels,
            decoder.cross_attention_widening_factor,
            decoder.cross_attention_residual,
        ),
        num_output_channels=num_output_channels,
        tied_to="tokens" if tied else None,
    )


def _output(model: KrassermModel, num_input_channels: int) -> tuple[str, OutputConfig, int, bool]:
    """The output's name, itself, the width of its last layer, and whether that is the token embedding."""
    decoder = model.decoder
    if isinstance(model, OpticalFlow):
        height, width = model.encoder.image_shape
        scale = _FLOW_TARGETS / model.decoder.rescale_factor
        queries = InputQueries(height * width, num_input_channels)
        return "flow", OutputConfig(queries, (height, width, 2), scale=scale), 2, False
    if isinstance(decoder, TextDecoder):
        length = text_length(model)
        learned = LearnedQueries(length, decoder.num_output_query_channels or num_input_channels)
        tied = decoder.num_output_query_channels is None
        return "logits", OutputConfig(learned, (length, decoder.vocab_size)), 0 if tied else decoder.vocab_size, tied
    assert isinstance(decoder, ClassDecoder)
    count = 1 if isinstance(model, ImageClassifier) else decoder.num_output_queries
    learned = LearnedQueries(count, decoder.num_output_query_channels)
    shape = (decoder.num_classes,) if count == 1 else (count, decoder.num_classes)
    return "logits", OutputConfig(learned, shape), decoder.num_classes, False


def _attention(
    where: str,
    num_heads: int,
    num_qk_channels: int,
    num_v_channels: int | None,
    widening_factor: int,
    query_residual: bool = True,
) -> AttentionConfig:
    """Values are as wide as keys where nothing is said."""
    num_v_channels = num_v_channels or num_qk_channels
    if num_qk_channels % num_heads or num_v_channels % num_heads:
        raise CheckpointError(
            f"{where}: {num_qk_channels} qk_channels and {num_v_channels} v_channels cannot be split into {num_heads} "
            "heads",
            "config.json is not of a model that perceiver-io can run",
        )
    return AttentionConfig(num_heads, num_qk_channels, num_v_channels, widening_factor, query_residual)
