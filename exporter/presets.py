# SPDX-License-Identifier: Apache-2.0
"""The systems of both papers at their full sizes, to size a device before there is a checkpoint.

presets.json has the figures of each. Its remarks name each size that a paper leaves open, and each count that its sizes
do not explain. Only `load_preset` imports torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.model.architectures import AudioVideoSizes, Parity
from perceiver_export.exporter.model.config import (
    ArrayInput,
    AverageDecoder,
    FramePairInput,
    ImageInput,
    PerceiverConfig,
    TokenInput,
)
from perceiver_export.exporter.preset_sizes import BUILDERS
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


class Preset(msgspec.Struct, frozen=True):
    """One system: its counts with DeepMind's numerics, and its paper.

    ``parameters`` and ``flops`` are the paper's own, None where it has none. ``remark``: deviations, and the choice
    where the paper is silent.
    """

    name: str
    task: str
    counts: Counts
    reference: str
    parameters: float | None = None
    flops: float | None = None
    remark: str = ""

    def build(self, parity: Parity) -> PerceiverConfig:
        """Its config."""
        return BUILDERS[self.name](parity)


_FILE = Path(__file__).with_name("presets.json")
PRESETS = {one.name: one for one in msgspec.json.decode(_FILE.read_bytes(), type=list[Preset])}


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
