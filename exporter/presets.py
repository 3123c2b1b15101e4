# SPDX-License-Identifier: Apache-2.0
"""The systems of both papers at their full sizes, to size a device before there is a checkpoint.

The remarks name each size that a paper leaves open, and each count that its sizes do not explain. Only `load_preset`
imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from perceiver_export.exporter import preset_sizes as sizes
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.model.architectures import AudioVideoSizes, EncoderSizes, Parity
from perceiver_export.exporter.model.config import (
    ArrayInput,
    AverageDecoder,
    FramePairInput,
    ImageInput,
    PerceiverConfig,
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

SAMPLE_RATE = 48_000  # in both papers


def _preprocessing(task: str, config: PerceiverConfig, parity: Parity) -> Preprocessing | None:
    """The steps before a model of these sizes; None where it takes arrays."""
    one, frames = next(iter(config.inputs.values())), config.inputs.get("frames")
    if isinstance(one, ImageInput):
        from perceiver_export.exporter.checkpoints.preprocessor import as_deepmind, image_preprocessing

        steps = image_preprocessing({}, one.height, one.width)
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
        return VideoPreprocessing(num_frames, height, width, one.shape[0], SAMPLE_RATE)
    mel = (one.shape[0], one.shape[1]) if len(one.shape) == 2 else None
    # A spectrogram covers as many samples as the model of raw audio.
    num_samples = AudioVideoSizes.num_samples if mel else one.shape[0]
    return AudioPreprocessing(num_samples, SAMPLE_RATE, num_frames, height, width, mel)


class Counts(NamedTuple):
    """Trained numbers, and FLOPs of one sample: with all queries, and with the first query of each output.

    FLOPs are those of matrix products and convolutions, a multiply-add as 2, as both papers count (Perceiver IO,
    appendix D). Tests compare these figures with torch's own counter.
    """

    parameters: int
    flops: int
    flops_of_one_query: int


@dataclass(frozen=True)
class Preset:
    """One system: a function of the parity that builds its config, its counts with DeepMind's numerics, and its paper.

    ``parameters`` and ``flops`` are the paper's own, None where it has none. ``remark``: deviations, and the choice
    where the paper is silent.
    """

    task: str
    build: Callable[[Parity], PerceiverConfig]
    counts: Counts
    reference: str
    parameters: float | None = None
    flops: float | None = None
    remark: str = ""


PRESETS: dict[str, Preset] = {
    "language-bytes": Preset(
        "fill-mask",
        partial(sizes.language, sizes.BYTES, 2048, 1280, 26),
        Counts(201_108_230, 120_949_047_296, 111_002_919_936),
        "Perceiver IO, tables 1 and 11",
        201e6,
        113e9,
        remark="The paper's FLOPs are nearly those of one query, not of all 2048.",
    ),
    "language-bytes-plus-plus": Preset(
        "fill-mask",
        partial(sizes.language, sizes.BYTES, 2048, 1536, 40),
        Counts(425_607_430, 240_872_587_264, 230_926_459_904),
        "Perceiver IO++, tables 1 and 11",
        425e6,
        241e9,
        remark="The paper's FLOPs are those of all 2048 queries, unlike those of language-bytes.",
    ),
    "language-sentencepiece": Preset(
        "arrays",
        partial(sizes.language, sizes.SENTENCEPIECE, 512, 1280, 26),
        Counts(223_155_456, 133_613_748_224, 106_219_831_296),
        "Perceiver IO, tables 1 and 11",
        223e6,
        119e9,
        remark="The paper's FLOPs are neither those of all 512 queries nor of one; how it counts is not published."
        " Tokens in, scores out: the tokenizer is yours.",
    ),
    "language-classification": Preset(
        "text-classification",
        sizes.sentence_classifier,
        Counts(206_098_690, 112_019_117_056, 112_019_117_056),
        "Perceiver IO, section F.4",
        None,
        113e9,
        remark="The FLOPs are those of table 1. A linear layer gives the classes, as in transformers; the paper has two"
        " layers.",
    ),
    "language-multitask": Preset(
        "text-classification",
        sizes.glue,
        Counts(206_125_584, 123_864_129_536, 123_864_129_536),
        "Perceiver IO, section 4.1",
        remark="A linear layer gives each task's classes; the paper has two, 13.1 M parameters more. torch"
        " projects the latents to keys and values again for each task (1.7 GFLOP), the exported graph once.",
    ),
    "imagenet-learned": Preset(
        "image-classification",
        partial(sizes.imagenet, "conv1x1", 224, sizes.CONFIG_A),
        Counts(62_255_848, 478_038_933_504, 478_038_933_504),
        "Perceiver IO, table 7",
        62.3e6,
        407e9,
        remark="The paper has the same FLOPs as with Fourier positions; but this model reads 512 channels a pixel, not"
        " 261, and projects its positions.",
    ),
    "imagenet-fourier": Preset(
        "image-classification",
        partial(sizes.imagenet, "pixels", 224, sizes.CONFIG_A),
        Counts(48_440_627, 406_124_744_704, 406_124_744_704),
        "Perceiver IO, table 7",
        48.4e6,
        407e9,
    ),
    "imagenet-conv": Preset(
        "image-classification",
        partial(sizes.imagenet, "conv", 56, sizes.CONFIG_A),
        Counts(48_646_522, 369_364_730_880, 369_364_730_880),
        "Perceiver IO, table 7",
        48.6e6,
        369e9,
    ),
    "imagenet-fourier-b": Preset(
        "image-classification",
        partial(sizes.imagenet, "pixels", 224, sizes.CONFIG_B),
        Counts(212_170_035, 268_685_791_232, 268_685_791_232),
        "Perceiver IO, table 7 and section A.2",
        212e6,
        213e9,
        remark="16 layers with MLPs four times as wide, which the parameters confirm, take 223 GFLOP alone, more than"
        " the paper's total. Section A.2 projects pixels to 256 channels first, which would be 213.1 M and 335 GFLOP.",
    ),
    "imagenet-conv-b": Preset(
        "image-classification",
        partial(sizes.imagenet, "conv", 56, sizes.CONFIG_B),
        Counts(212_375_930, 231_925_777_408, 231_925_777_408),
        "Perceiver IO, table 7 and section A.2",
        212e6,
        176e9,
        remark="As imagenet-fourier-b: the latent layers alone take 223 GFLOP.",
    ),
    "optical-flow": Preset(
        "optical-flow",
        sizes.flow,
        Counts(41_057_134, 1_886_745_225_216, 924_867_361_048),
        "Perceiver IO, section H",
        27.9e6,
        987e9,
        remark="The released model. The paper's counts do not follow from what it describes: 24 layers of 512 channels"
        " alone have 37.9 M parameters. It projects features and positions to 64 channels, the released model features"
        " only.",
    ),
    "video-autoencoding": Preset(
        "video-autoencoding",
        partial(sizes.video, 784),
        Counts(19_857_443, 7_472_063_721_488, 252_544_136_240),
        "Perceiver IO, tables 4 and 17",
        20.0e6,
        6.85e12,
        remark="The released model. Why the paper counts fewer FLOPs is unknown. It describes positions of 387"
        " channels, the released model has 195; both are padded to the same width, so the FLOPs are equal.",
    ),
    "video-autoencoding-176x": Preset(
        "video-autoencoding",
        partial(sizes.video, 392),
        Counts(19_656_739, 6_748_872_316_944, 175_406_062_640),
        "Perceiver IO, table 4",
    ),
    "video-autoencoding-352x": Preset(
        "video-autoencoding",
        partial(sizes.video, 196),
        Counts(19_556_387, 6_389_164_837_904, 138_725_249_072),
        "Perceiver IO, table 4",
    ),
    "audioset-raw": Preset(
        "audio-classification",
        partial(sizes.audioset, None, 512),
        Counts(24_922_462, 52_708_002_688, 52_708_002_688),
        "Perceiver IO, table 10",
        25.0e6,
        52.9e9,
        remark="The paper says 64 bands an axis; its 487 channels leave 16 beside video patches of 2 × 8 × 8.",
    ),
    "audioset-mel": Preset(
        "audio-classification",
        partial(sizes.audioset, sizes.MEL, 1024),
        Counts(86_568_284, 129_274_484_480, 129_274_484_480),
        "Perceiver IO, table 10",
        88.2e6,
        129.5e9,
        remark="The paper has 1.6 M parameters more, which it does not explain. It gives the spectrogram 4800 values:"
        " here they are 75 frames of 64 bins, with positions along both axes, where the paper has one axis.",
    ),
    "starcraft": Preset(
        "sets",
        sizes.starcraft,
        Counts(6_627_456, 1_012_924_416, 544_079_872),
        "Perceiver IO, section B and tables 5 and 9",
        None,
        0.93e9,
        remark="The latents' width is not published; of the powers of two, 512 comes nearest. The paper's 140 M"
        " parameters must be the whole agent's: the Transformer replaced, 144 M there, has 2.4 M by its sizes.",
    ),
    "perceiver-imagenet": Preset(
        "image-classification",
        partial(sizes.first_imagenet, 8, "all-but-first", "all"),
        Counts(44_912_254, 706_279_096_320, 706_279_096_320),
        "Perceiver, table 6",
        44.9e6,
        707.2e9,
    ),
    "perceiver-imagenet-1x": Preset(
        "image-classification",
        partial(sizes.first_imagenet, 1, "all-but-first", "all"),
        Counts(42_135_859, 403_966_775_296, 403_966_775_296),
        "Perceiver, table 6",
        42.1e6,
        404.3e9,
    ),
    "perceiver-imagenet-unshared": Preset(
        "image-classification",
        partial(sizes.first_imagenet, 8, "none", "none"),
        Counts(326_241_856, 706_279_096_320, 706_279_096_320),
        "Perceiver, table 7",
        326.2e6,
        707.2e9,
    ),
    "perceiver-audioset": Preset(
        "audio-classification",
        partial(sizes.first_audioset, EncoderSizes(512, 512, 12)),
        Counts(20_971_870, 52_163_252_096, 52_163_252_096),
        "Perceiver IO, table 10",
        21.0e6,
        52.3e9,
        remark="The first Perceiver as the second paper runs it: inputs are read once. Bands as in audioset-raw.",
    ),
    "perceiver-audioset-2x": Preset(
        "audio-classification",
        partial(sizes.first_audioset, EncoderSizes(512, 1024, 8, 2)),
        Counts(109_048_771, 177_288_519_424, 177_288_519_424),
        "Perceiver, section 4.2",
        remark="The paper does not give the size of the latents: here it is ImageNet's. Bands as in audioset-raw.",
    ),
    "modelnet40": Preset(
        "point-cloud-classification",
        sizes.modelnet,
        Counts(44_772_202, 101_812_764_672, 101_812_764_672),
        "Perceiver, section 4.3",
        remark="The paper has about 2000 points; here there are 2048, as in ModelNet40's usual files.",
    ),
}


def load_preset(name: str, parity: Parity, image_shape: tuple[int, int, int] | None = None) -> LoadedModel:
    """The preset with random weights, the same ones each time.

    ``image_shape`` (channels, height, width) is the image that a classifier will see, 3 × 224 × 224 unless
    given: Fourier positions are computed on its grid, a learned table is resized to it.

    Raises UsageError: no such preset, or images that it does not take.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise UsageError(
            f"there is no preset {name!r}", f"did you mean {near[0]}?" if near else f"presets: {', '.join(PRESETS)}"
        )
    import torch

    from perceiver_export.exporter.model.perceiver import PerceiverIO

    preset = PRESETS[name]
    config = preset.build(parity)
    if image_shape is not None:
        config = resized(f"preset {name}", config, image_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PerceiverIO(config).eval()
    return described(preset.task, model, parity, f"preset:{name} (random weights)")


def described(task: str, model: PerceiverIO, parity: Parity, source: str) -> LoadedModel:
    """A model of a preset's kind, with labels and preprocessing by its sizes."""
    config = model.config
    return LoadedModel(
        model=model,
        config=config,
        task=task,
        parity=parity,
        source=source,
        labels=_labels(task, config),
        preprocessing=_preprocessing(task, config, parity),
        split=task == "video-autoencoding",
    )


def resized(source: str, config: PerceiverConfig, image_shape: tuple[int, int, int]) -> PerceiverConfig:
    """``config`` for images of another size. Raises UsageError if it does not take them."""
    image = config.inputs.get("image")
    if not isinstance(image, ImageInput):
        raise UsageError(f"{source} reads no images: its sizes are fixed", "leave --shape out")
    channels, height, width = image_shape
    if channels != image.num_channels:
        raise UsageError(f"{source} reads {image.num_channels} channels, not {channels}", "give --shape image=3xHxW")
    other = msgspec.structs.replace(image, height=height, width=width)
    return msgspec.structs.replace(config, inputs={**config.inputs, "image": other})


def _labels(task: str, config: PerceiverConfig) -> tuple[str, ...]:
    """Names of the classes; none for several tasks, or without classes."""
    if not task.endswith("-classification") and task != "video-autoencoding":
        return ()
    if isinstance(config.decoder, AverageDecoder):
        count = config.decoder.num_output_channels
    else:
        classes = config.decoder.outputs.get("label" if task == "video-autoencoding" else "logits")
        count = classes.shape[0] if classes is not None else 0
    return tuple(f"LABEL_{index}" for index in range(count))
