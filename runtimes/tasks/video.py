# SPDX-License-Identifier: Apache-2.0
"""Video autoencoding: video and sound are encoded into a few latents, and decoded from them with a label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.engines.backend import Progress
from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.manifest import Manifest, OutputKind
from perceiver_export.runtimes.preprocessing import VideoPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds, pad_batch
from perceiver_export.runtimes.split import decode
from perceiver_export.runtimes.tasks import base
from perceiver_export.runtimes.tasks.base import LoadPart, Prediction, Task
from perceiver_export.runtimes.tasks.image_files import Color
from perceiver_export.runtimes.tasks.images import FramesLike, prepare_frames, read_frames
from perceiver_export.runtimes.tasks.sound import AudioLike, take_sound

OUTPUTS = ("video", "sound", "label")
# A decoder that takes any number of queries gets about as many at once as in DeepMind's notebook (6272 pixels), so that
# the attention scores stay small. Each step reports progress.
_QUERIES_A_STEP = 8192


@dataclass(frozen=True)
class Reconstruction:
    """Reconstructed ``video`` float32 (T, H, W, 3) in [0, 1], ``sound`` float32 (samples,) in [-1, 1], and labels."""

    video: npt.NDArray[np.float32]
    sound: npt.NDArray[np.float32]
    labels: list[Prediction]

    @property
    def frames(self) -> npt.NDArray[np.uint8]:
        """The video as uint8 (T, H, W, 3)."""
        return np.round(self.video * 255).astype(np.uint8)


class VideoAutoencoding(Task):
    """``autoencode(frames, audio)`` -> `Reconstruction`; ``label(frames, audio)`` decodes only the label.

    Frames are a directory of images, a .npy file, an array of uint8 (T, H, W, 3), or a list of image files, Pillow
    images and arrays. Arrays are RGB; with ``color="bgr"`` they are BGR, as OpenCV reads them. Sound is a WAV file or
    an array; None is silence. Input longer than the model's is cut off at its length. A split bundle encodes once and
    then decodes in steps, so it needs far less memory than a bundle of one graph.
    """

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        self.preprocessing = base.steps_of(manifest, VideoPreprocessing)

    @property
    def kind(self) -> OutputKind:
        """The kind of output of the label's scores."""
        return base.answering(self.manifest)[1]

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes an autoencoder of video and sound."""
        steps = base.steps_of(manifest, VideoPreprocessing)
        shapes = _shapes(steps)
        inputs = {"frames": shapes["video"], "audio": shapes["sound"]}
        base.check_interface(manifest, inputs, {**shapes, "label": (None,)})
        if base.answering(manifest)[0] != "label":
            raise base.misfit("the manifest does not describe the output `label`")
        if "encoder" in manifest.parts:
            _check_decoders(manifest, steps)

    def autoencode(
        self, frames: FramesLike, audio: AudioLike | None = None, top: int = 5, color: Color = "rgb"
    ) -> Reconstruction:
        """Encode and decode everything. Raises InputError: unsuitable frames or sound; UsageError: top below 1."""
        base.check_top(top)
        return self.reconstruct(self.preprocess(frames, audio, color), top)

    __call__ = autoencode

    def label(
        self, frames: FramesLike, audio: AudioLike | None = None, top: int = 5, color: Color = "rgb"
    ) -> list[Prediction]:
        """The ``top`` labels, most probable first. A split bundle decodes only them. Raises as `autoencode`."""
        base.check_top(top)
        feeds = self.preprocess(frames, audio, color)
        scores = self.decode("label", self.encode(feeds)) if self.split else self.run_inputs(feeds)["label"]
        return base.answer(scores[0], self.kind, self.manifest.labels, top)

    def preprocess(self, frames: FramesLike, audio: AudioLike | None = None, color: Color = "rgb") -> dict[str, Array]:
        """The model's inputs: ``frames`` (1, T, H, W, 3) in [0, 1], ``audio`` (1, samples, 1) in [-1, 1]."""
        steps = self.preprocessing
        images = read_frames(frames, steps.num_frames, color)
        sound = np.zeros(steps.num_samples, np.float32)
        if audio is not None:
            sound = take_sound(audio, steps.sample_rate, steps.num_samples)
        return {"frames": prepare_frames(images, steps.height, steps.width)[None], "audio": sound[None, :, None]}

    def reconstruct(self, feeds: Feeds, top: int = 5, progress: Progress | None = None) -> Reconstruction:
        """Like `autoencode`, for one preprocessed sample."""
        outputs = self.run_inputs(feeds, progress)
        return Reconstruction(
            np.clip(outputs["video"][0], 0, 1),
            np.clip(outputs["sound"][0, :, 0], -1, 1),
            base.answer(outputs["label"][0], self.kind, self.manifest.labels, top),
        )

    def run_inputs(self, feeds: Feeds, progress: Progress | None = None) -> dict[str, Array]:
        """The model's outputs for n preprocessed samples, without clipping.

        ``video`` (n, T, H, W, 3), ``sound`` (n, samples, 1) and ``label`` (n, labels).
        """
        if not self.split:
            return base.run_batched(self.runtime, feeds)
        latents = self.encode(feeds)
        return {name: self.decode(name, latents, progress) for name in OUTPUTS}

    def encode(self, feeds: Feeds) -> Array:
        """The latents (n, N, D) of n preprocessed samples; split bundles only."""
        return base.run_batched(self.part("encoder"), feeds)["latents"]

    def decode(self, output: str, latents: Array, progress: Progress | None = None) -> Array:
        """One output for latents (n, N, D), in the shape that `run_inputs` returns; split bundles only."""
        decoder = self.part(f"decoder_{output}")
        if len(decoder.inputs) == 1:  # a decoder with a single query takes no index
            return base.run_batched(decoder, {"latents": latents})[output]
        most = decoder.inputs[0].limits(0)[1]
        chunks = [latents[start : start + most] for start in range(0, len(latents), most)]
        rows = np.concatenate([self._rows(output, chunk, progress) for chunk in chunks])
        return rows.reshape(len(latents), *_shapes(self.preprocessing).get(output, (-1,)))

    def _rows(self, output: str, latents: Array, progress: Progress | None) -> Array:
        """Rows (n, queries, E) for all queries of an output; n is at most the decoder's largest batch."""
        decoder, total = self.part(f"decoder_{output}"), self.manifest.parts[f"decoder_{output}"].num_queries
        assert total is not None  # `check` ensures it
        feeds = pad_batch(decoder, {"latents": latents})
        queries = np.arange(total, dtype=np.int32)
        # A decoder with a fixed number of queries gets a multiple of that number in each step.
        least, most = next(spec for spec in decoder.inputs if spec.name == "queries").limits(1)
        step = most * max(1, _QUERIES_A_STEP // most) if least == most else min(most, _QUERIES_A_STEP)
        parts = []
        for start in range(0, total, step):
            parts.append(decode(decoder, feeds, queries[start : start + step], total)[: len(latents)])
            if progress is not None:
                progress(f"decode {output}", min(start + step, total), total)
        return np.concatenate(parts, axis=1)


def _shapes(steps: VideoPreprocessing) -> dict[str, tuple[int, ...]]:
    """The shapes of the outputs that are fixed by the preprocessing, without the batch dimension."""
    return {"video": (steps.num_frames, steps.height, steps.width, 3), "sound": (steps.num_samples, 1)}


def psnr(reference: npt.NDArray[np.float32], found: npt.NDArray[np.float32], peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB, 10·log10(peak² / mean squared error); infinite if both are equal.

    ``peak`` is 1 for images in [0, 1] and also 1, the amplitude of full scale, for sound in [-1, 1]. Raises InputError:
    the shapes differ.
    """
    if reference.shape != found.shape:
        raise InputError(f"shapes {list(reference.shape)} and {list(found.shape)} differ", "give the same shape twice")
    error = float(np.mean((reference.astype(np.float64) - found) ** 2))
    return 10 * float(np.log10(peak**2 / error)) if error > 0 else float("inf")


def _check_decoders(manifest: Manifest, steps: VideoPreprocessing) -> None:
    """Raise BundleError unless each output has a decoder, and its queries give the whole output."""
    shapes = _shapes(steps)
    for name in OUTPUTS:
        size = math.prod(shapes[name]) if name in shapes else None
        part = manifest.parts.get(f"decoder_{name}")
        gives = [spec.name for spec in part.outputs] if part is not None else []
        if part is None or gives != [name] or [spec.name for spec in part.inputs[:1]] != ["latents"]:
            raise base.misfit(f"the part decoder_{name} is missing or incomplete")
        if [spec.name for spec in part.inputs[1:]] == ["queries"]:
            width = part.outputs[0].shape[-1] if part.outputs[0].shape else None
            if not part.num_queries or not isinstance(width, int) or size not in (None, part.num_queries * width):
                raise base.misfit(
                    f"decoder_{name} gives {part.num_queries} × {width} values, but the {name} has {size}"
                )
        elif len(part.inputs) > 1:
            raise base.misfit(f"decoder_{name} takes other inputs than latents and queries")
