# SPDX-License-Identifier: Apache-2.0
"""The systems of both papers at full size, to size a device before there is a checkpoint.

"Perceiver IO" is arXiv 2107.14795v3, "Perceiver" arXiv 2103.03206v2. presets.json has the figures of each system. Its
remarks name every size that a paper leaves open and every count that the sizes do not explain. Only `load_preset`
imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.model import architectures as systems
from perceiver_export.exporter.model.architectures import AudioVideoSizes, EncoderSizes, Parity
from perceiver_export.exporter.model.config import (
    ArrayInput,
    AttentionConfig,
    AverageDecoder,
    Features,
    FramePairInput,
    ImageInput,
    PerceiverConfig,
    Sharing,
    TokenInput,
)
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.preprocessing import (
    AudioPreprocessing,
    FlowPreprocessing,
    PointsPreprocessing,
    Preprocessing,
    TextPreprocessing,
    VideoPreprocessing,
)

if TYPE_CHECKING:
    from perceiver_export.exporter.model.perceiver import PerceiverIO

BYTES, SENTENCEPIECE = 262, 32_000  # sizes of the vocabularies
IMAGENET_CLASSES, KINETICS_CLASSES, AUDIOSET_CLASSES, MODELNET_CLASSES = 1000, 700, 527, 40
GLUE_CLASSES = {"cola": 2, "mnli": 3, "mrpc": 2, "qnli": 2, "qqp": 2, "rte": 2, "sst2": 2, "stsb": 1}
MEL = (75, 64)  # frames, bins: only their product, 4800, is published

# Perceiver IO, section A: configuration A shares 6 layers 8 times, B has 16 with MLPs four times as wide.
CONFIG_A = EncoderSizes(512, 1024, num_self_attentions_per_block=6, num_blocks=8)
CONFIG_B = EncoderSizes(512, 1024, num_self_attentions_per_block=16, self_attention_widening_factor=4)


def _text_encoder(num_channels: int, num_layers: int) -> EncoderSizes:
    return EncoderSizes(256, num_channels, num_layers, 1, 8, 8, num_qk_channels=256, num_v_channels=num_channels)


def language(vocabulary_size: int, length: int, num_channels: int, num_layers: int, parity: Parity) -> PerceiverConfig:
    """Masked language models: Perceiver IO, table 11; attention widths from DeepMind's code."""
    tokens = TokenInput(vocabulary_size, length, 768)
    decoder = AttentionConfig(8, 256, 768, query_residual=False)
    return systems.language_model(tokens, _text_encoder(num_channels, num_layers), decoder, parity)


_BYTES_768 = TokenInput(BYTES, 2048, 768)
# The byte model for one task, and for several with a query and a head each: Perceiver IO, sections F.4 and 4.1.
sentence_classifier = partial(systems.classifier, {"tokens": _BYTES_768}, _text_encoder(1280, 26), 2)
glue = partial(systems.multitask_text_classifier, _BYTES_768, _text_encoder(1280, 26), GLUE_CLASSES)
# The released model of optical flow.
flow = partial(systems.optical_flow, 368, 496, EncoderSizes(2048, 512, 24, num_self_attention_heads=16))
# The entity encoder of AlphaStar: Perceiver IO, section B and table 5.
starcraft = partial(systems.set_transformer, 512, 256, 128, EncoderSizes(32, 512, 3))


def imagenet(features: Features, grid: int, encoder: EncoderSizes, parity: Parity) -> PerceiverConfig:
    """Perceiver IO, table 7."""
    image = systems.image_input(features, 224, 224, parity, (grid, grid))
    return systems.image_classifier(image, encoder, IMAGENET_CLASSES, parity)


def video(num_latents: int, parity: Parity) -> PerceiverConfig:
    """The released video autoencoder, with 784, 392 or 196 latents: Perceiver IO, section 4.3."""
    sizes = systems.VideoSizes(num_labels=KINETICS_CLASSES)
    return systems.video_autoencoder(sizes, EncoderSizes(num_latents, 512, 8), parity)


def audioset(mel: tuple[int, int] | None, num_channels: int, parity: Parity) -> PerceiverConfig:
    """Perceiver IO, section C and tables 6 and 10."""
    sizes, encoder = AudioVideoSizes(mel=mel), EncoderSizes(512, num_channels, 12)
    return systems.audio_video_classifier(sizes, encoder, AUDIOSET_CLASSES, parity, num_query_channels=1024)


def first_imagenet(num_cross_attentions: int, sharing: tuple[Sharing, Sharing], parity: Parity) -> PerceiverConfig:
    """Perceiver, sections 4.1, B and C. ``sharing``: that of cross-attentions, and that of blocks."""
    image = systems.image_input("pixels", 224, 224, parity, (224, 224))
    return systems.first_perceiver({"image": image}, CONFIG_A, IMAGENET_CLASSES, parity, num_cross_attentions, *sharing)


def first_audioset(encoder: EncoderSizes, parity: Parity) -> PerceiverConfig:
    """Raw audio and video, read before every block, no weights shared: Perceiver, section 4.2."""
    sizes = AudioVideoSizes()
    return systems.first_perceiver(
        sizes.inputs(parity),
        encoder,
        AUDIOSET_CLASSES,
        parity,
        num_cross_attentions=encoder.num_blocks,
        cross_attention_sharing="none",
        block_sharing="none",
        num_input_channels=sizes.num_input_channels,
    )


def modelnet(parity: Parity) -> PerceiverConfig:
    """Perceiver, section 4.3: the input is read twice, otherwise as for ImageNet."""
    points = systems.point_input(2048, num_bands=64, max_frequency=1120, parity=parity)
    encoder = EncoderSizes(512, 1024, num_self_attentions_per_block=6, num_blocks=2)
    return systems.first_perceiver({"points": points}, encoder, MODELNET_CLASSES, parity, num_cross_attentions=2)


# One for each system in presets.json.
BUILDERS: dict[str, Callable[[Parity], PerceiverConfig]] = {
    "language-bytes": partial(language, BYTES, 2048, 1280, 26),
    "language-bytes-plus-plus": partial(language, BYTES, 2048, 1536, 40),
    "language-sentencepiece": partial(language, SENTENCEPIECE, 512, 1280, 26),
    "language-classification": sentence_classifier,
    "language-multitask": glue,
    "imagenet-learned": partial(imagenet, "conv1x1", 224, CONFIG_A),
    "imagenet-fourier": partial(imagenet, "pixels", 224, CONFIG_A),
    "imagenet-conv": partial(imagenet, "conv", 56, CONFIG_A),
    "imagenet-fourier-b": partial(imagenet, "pixels", 224, CONFIG_B),
    "imagenet-conv-b": partial(imagenet, "conv", 56, CONFIG_B),
    "optical-flow": flow,
    "video-autoencoding": partial(video, 784),
    "video-autoencoding-176x": partial(video, 392),
    "video-autoencoding-352x": partial(video, 196),
    "audioset-raw": partial(audioset, None, 512),
    "audioset-mel": partial(audioset, MEL, 1024),
    "starcraft": starcraft,
    "perceiver-imagenet": partial(first_imagenet, 8, ("all-but-first", "all")),
    "perceiver-imagenet-1x": partial(first_imagenet, 1, ("all-but-first", "all")),
    "perceiver-imagenet-unshared": partial(first_imagenet, 8, ("none", "none")),
    "perceiver-audioset": partial(first_audioset, EncoderSizes(512, 512, 12)),
    "perceiver-audioset-2x": partial(first_audioset, EncoderSizes(512, 1024, 8, 2)),
    "modelnet40": modelnet,
}


SAMPLE_RATE = 48_000  # in both papers


def preprocessing(
    task: str, config: PerceiverConfig, parity: Parity, processor: dict[str, Any], sample_rate: int | None
) -> Preprocessing | None:
    """The preprocessing of a model of these sizes; None if it takes arrays.

    ``processor``: the settings of preprocessor_config.json. ``sample_rate``: of a video's sound, None if unknown.
    """
    one, frames = next(iter(config.inputs.values())), config.inputs.get("frames")
    if isinstance(one, ImageInput):
        from perceiver_export.exporter.checkpoints.preprocessor import as_deepmind, image_preprocessing

        steps = image_preprocessing(processor, one.height, one.width)
        return as_deepmind(steps) if parity == "deepmind" else steps
    if isinstance(one, FramePairInput):
        return FlowPreprocessing.of_tile(one.height, one.width)
    if isinstance(one, TokenInput) and task != "arrays":
        return TextPreprocessing(one.length, special_tokens=parity == "huggingface")
    if task == "point-cloud-classification" and isinstance(one, ArrayInput):
        return PointsPreprocessing(one.shape[0])
    if not isinstance(frames, ArrayInput) or not isinstance(one, ArrayInput):
        return None
    num_frames, height, width = frames.shape
    if task == "video-autoencoding":
        return VideoPreprocessing(num_frames, height, width, one.shape[0], sample_rate)
    mel = (one.shape[0], one.shape[1]) if len(one.shape) == 2 else None
    # A spectrogram covers as many samples as the model of raw audio.
    num_samples = AudioVideoSizes.num_samples if mel else one.shape[0]
    return AudioPreprocessing(num_samples, SAMPLE_RATE, num_frames, height, width, mel)


class Counts(NamedTuple):
    """Parameters, and FLOPs per sample: with all queries, and with the first query of each output.

    FLOPs are those of matrix products and convolutions; a multiply-add counts as 2, as in both papers (Perceiver IO,
    appendix D). Tests compare these figures with torch's own counter.
    """

    parameters: int
    flops: int
    flops_of_one_query: int


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One system: its counts with DeepMind's numerics, and its paper.

    ``parameters`` and ``flops`` are the paper's own, None if it gives none. ``remark``: deviations, and choices where
    the paper is silent.
    """

    name: str
    task: str
    counts: Counts
    reference: str
    parameters: float | None = None
    flops: float | None = None
    remark: str = ""

    def build(self, parity: Parity) -> PerceiverConfig:
        """Build its config."""
        return BUILDERS[self.name](parity)


_FILE = Path(__file__).with_name("presets.json")
PRESETS = {one.name: one for one in msgspec.json.decode(_FILE.read_bytes(), type=list[Preset])}


def load_preset(name: str, parity: Parity, image_shape: tuple[int, int, int] | None = None) -> LoadedModel:
    """The preset with random weights, which are the same each time.

    ``image_shape`` (channels, height, width) is that of a classifier's images, 3 × 224 × 224 by default: Fourier
    positions are computed on its grid, a learned table is resized to it.

    Raises UsageError if there is no such preset, or it does not take such images.
    """
    if name not in PRESETS:
        near = [one for one in PRESETS if name and name in one] or difflib.get_close_matches(name, PRESETS, n=1)
        said = f"did you mean {' or '.join(near)}?" if near else f"presets: {', '.join(PRESETS)}"
        raise UsageError(f"there is no preset {name!r}", said)
    import torch

    from perceiver_export.exporter.model.perceiver import PerceiverIO

    preset = PRESETS[name]
    config = resized(f"preset {name}", preset.build(parity), image_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PerceiverIO(config).eval()
    return described(preset.task, model, parity, f"preset:{name} (random weights)")


def described(task: str, model: PerceiverIO, parity: Parity, source: str) -> LoadedModel:
    """A model of a preset's kind, with the labels and preprocessing of its sizes."""
    config = model.config
    steps, split = preprocessing(task, config, parity, {}, SAMPLE_RATE), task == "video-autoencoding"
    return LoadedModel(model, config, task, parity, source, _labels(task, config), steps, split)


def resized(source: str, config: PerceiverConfig, image_shape: tuple[int, int, int] | None) -> PerceiverConfig:
    """``config`` for images of another size, if one is given. Raises UsageError if it does not take them."""
    if image_shape is None:
        return config
    image = config.inputs.get("image")
    if not isinstance(image, ImageInput):
        raise UsageError(f"the input sizes of {source} are fixed", "leave --shape out")
    channels, height, width = image_shape
    if channels != image.num_channels:
        raise UsageError(f"{source} reads {image.num_channels} channels, not {channels}", "give --shape image=3xHxW")
    other = msgspec.structs.replace(image, height=height, width=width)
    return msgspec.structs.replace(config, inputs={**config.inputs, "image": other})


def _labels(task: str, config: PerceiverConfig) -> tuple[str, ...]:
    """Names of the classes; none if the model has several tasks, or no classes."""
    if not task.endswith("-classification") and task != "video-autoencoding":
        return ()
    if isinstance(config.decoder, AverageDecoder):
        count = config.decoder.num_output_channels
    else:
        classes = config.decoder.outputs.get("label" if task == "video-autoencoding" else "logits")
        count = classes.shape[0] if classes is not None else 0
    return tuple(f"LABEL_{index}" for index in range(count))
