# SPDX-License-Identifier: Apache-2.0
"""Sound in, with video where the model sees it too; labels out that do not exclude each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.audio_files import AudioLike, take_sound
from perceiver_export.runtimes.errors import BundleError, InputError
from perceiver_export.runtimes.frame_files import FramesLike, load_npy, read_frames
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.preprocessing import AudioPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.spectrograms import log_mel
from perceiver_export.runtimes.tasks.base import LoadPart, Task
from perceiver_export.runtimes.tasks.graphs import Shape, check_interface, check_labels, run_batched
from perceiver_export.runtimes.tasks.prediction import Prediction
from perceiver_export.runtimes.tasks.ranking import check_top, rank, sigmoid
from perceiver_export.runtimes.video_frames import prepare_frames


class AudioClassification(Task):
    """``classify(audio)``, or ``classify(audio, frames)``, -> the most probable labels.

    AudioSet's labels do not exclude each other: each probability is the sigmoid of its own logit, and they do not sum
    to one. Sound is a WAV file or an array (see `take_sound`). For a model of mel spectrograms a .npy file or an array
    of the model's (frames, bins) is taken as the log-mel spectrogram itself; from sound it is made by `log_mel`, whose
    parameters may not be those that the model was trained with. Of more than the model takes the beginning is taken.
    """

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        assert isinstance(manifest.preprocessing, AudioPreprocessing)  # `check` came first
        self.preprocessing: AudioPreprocessing = manifest.preprocessing

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a classifier of sound, of video, or of both."""
        steps = manifest.preprocessing
        if not isinstance(steps, AudioPreprocessing) or not _inputs(steps):
            raise BundleError("the manifest does not say how sound is preprocessed", "export the bundle again")
        check_interface(manifest, _inputs(steps), {"logits": (None,)})
        check_labels(manifest, "logits")

    @property
    def hears(self) -> bool:
        """Whether the model takes sound, as samples or as a spectrogram."""
        return bool(self.preprocessing.num_samples or self.preprocessing.mel)

    @property
    def sees(self) -> bool:
        """Whether the model takes frames."""
        return self.preprocessing.num_frames > 0

    def __call__(
        self, audio: AudioLike | None = None, frames: FramesLike | None = None, top: int = 5
    ) -> list[Prediction]:
        """The ``top`` labels, most probable first.

        Raises InputError: sound or frames that the model does not take, or does not get; UsageError: top below 1.
        """
        check_top(top)
        scores = self.run_inputs(self.preprocess(audio, frames))[0]
        return rank(sigmoid(scores), self.manifest.labels, top)

    def preprocess(self, audio: AudioLike | None = None, frames: FramesLike | None = None) -> dict[str, Array]:
        """The model's inputs of one sample: those it takes of ``audio`` (1, samples, 1), ``mel`` (1, frames, bins, 1)
        and ``frames`` (1, T, H, W, 3).
        """
        steps, feeds = self.preprocessing, dict[str, Array]()
        for name, given, wanted in (("sound", audio, self.hears), ("frames", frames, self.sees)):
            if (given is not None) != wanted:
                raise InputError(
                    f"the model takes {name}, and was given none" if wanted else f"the model takes no {name}",
                    f"give {name} as well" if wanted else f"leave the {name} out",
                )
        if audio is not None:
            name = "mel" if steps.mel else "audio"
            feeds[name] = (self._spectrogram(audio, *steps.mel) if steps.mel else self._sound(audio))[None, ..., None]
        if frames is not None:
            pictures = read_frames(frames, steps.num_frames)
            feeds["frames"] = prepare_frames(pictures, steps.height, steps.width)[None]
        return feeds

    def run_inputs(self, feeds: Feeds) -> npt.NDArray[np.float32]:
        """Logits (n, labels) of preprocessed inputs of n samples."""
        return run_batched(self.runtime, feeds)["logits"]

    def _sound(self, audio: AudioLike) -> npt.NDArray[np.float32]:
        return take_sound(audio, self.preprocessing.sample_rate, self.preprocessing.num_samples)

    def _spectrogram(self, audio: AudioLike, frames: int, bins: int) -> npt.NDArray[np.float32]:
        given, from_file = audio, False
        if not isinstance(audio, np.ndarray) and Path(audio).suffix.lower() == ".npy":
            given, from_file = load_npy(audio), True
        if isinstance(given, np.ndarray) and given.shape in ((frames, bins), (frames, bins, 1)):
            if given.dtype.kind != "f" or not np.isfinite(given).all():
                raise InputError(f"the spectrogram is {given.dtype}, or not finite", "give finite floating point")
            return given.reshape(frames, bins).astype(np.float32)
        if not self.preprocessing.num_samples or from_file:
            shape = f"has shape {list(given.shape)}" if isinstance(given, np.ndarray) else "is a sound file"
            raise InputError(f"what is given {shape}", f"the model takes a log-mel spectrogram ({frames}, {bins})")
        return log_mel(self._sound(given), self.preprocessing.sample_rate, frames, bins)


def _inputs(steps: AudioPreprocessing) -> dict[str, Shape]:
    inputs: dict[str, Shape] = {}
    if steps.mel:
        inputs["mel"] = (*steps.mel, 1)
    elif steps.num_samples:
        inputs["audio"] = (steps.num_samples, 1)
    if steps.num_frames:
        inputs["frames"] = (steps.num_frames, steps.height, steps.width, 3)
    return inputs
