# SPDX-License-Identifier: Apache-2.0
"""Image classification, and frames: lists of images that other tasks take as files or arrays.

A video's frames are preprocessed as in DeepMind's notebook: the middle square, resized, in [0, 1].
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.files import parsing
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.preprocessing import ImagePreprocessing
from perceiver_export.runtimes.tasks import base, image_files
from perceiver_export.runtimes.tasks.base import Classifier, LoadPart, Prediction
from perceiver_export.runtimes.tasks.image_files import Color, ImageLike, RgbImage


class ImageClassification(Classifier):
    """``classify(image)`` -> the most probable labels, or the values of a regression model.

    An image (``image``) is a path, a Pillow image, or a uint8 array (H, W) or (H, W, 3). Arrays are RGB; with
    ``color="bgr"`` they are BGR, as OpenCV reads them. ``color`` does not affect files and Pillow images.
    """

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        self.preprocessing = base.steps_of(manifest, ImagePreprocessing)
        (self._input,), (output,) = base.interface(manifest)
        size = output.shape[-1]
        # Without label names the index is the label, as in `answer`.
        self.labels = manifest.labels or tuple(map(str, range(size if isinstance(size, int) else 0)))

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes an image classifier."""
        steps = base.steps_of(manifest, ImagePreprocessing)
        inputs = {"image": (3, steps.height, steps.width)}
        base.check_interface(manifest, inputs, {base.answering(manifest)[0]: (None,)})

    def __call__(self, image: ImageLike, top: int = 5, color: Color = "rgb") -> list[Prediction]:
        """The ``top`` labels, most probable first, or all values.

        Raises InputError: an image that cannot be read; UsageError: top below 1.
        """
        base.check_top(top)
        return self.answers(self.logits([image], color)[0], top)

    def preprocess(self, image: ImageLike, color: Color = "rgb") -> npt.NDArray[np.float32]:
        """The model's input for one image, float32 (3, height, width)."""
        return image_files.to_input(image_files.take_image(image, color), self.preprocessing)

    def logits(self, images: ImageLike | Sequence[ImageLike], color: Color = "rgb") -> npt.NDArray[np.float32]:
        """Logits or values (images, labels) of one image or several, run in batches of the bundle's batch size.

        An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) is one image; (N, H, W, 3) and (N, H, W) are several.
        """
        listed = base.as_list(images, "images", image_files.is_image)
        return self.run_inputs({"image": np.stack([self.preprocess(image, color) for image in listed])})

    @property
    def batch_size(self) -> int:
        """The bundle's largest batch."""
        return self._input.limits(0)[1]


FramesLike: TypeAlias = str | os.PathLike[str] | npt.NDArray[np.uint8] | Sequence[ImageLike]


def read_frames(frames: FramesLike, count: int, color: Color = "rgb") -> list[RgbImage]:
    """The first ``count`` frames, uint8 RGB (H, W, 3), all of one size.

    ``frames`` is a directory of images (see `list_images`), a .npy file or an array of uint8 (T, H, W, 3), or a
    sequence of image files, Pillow images and uint8 arrays. ``color`` is the channel order of arrays and .npy files:
    "bgr" if OpenCV made them.

    Raises InputError: too few frames, frames of different sizes, not uint8, or not readable.
    """
    found = open_frames(frames)
    if len(found) < count:
        raise InputError(f"the model needs {count} frames, but got {len(found)}", "give more frames")
    images = [image_files.take_image(frame, color) for frame in found[:count]]
    for number, image in enumerate(images):
        if image.shape != images[0].shape:
            (height, width), (high, wide) = images[0].shape[:2], image.shape[:2]
            raise InputError(f"frame {number} is {high} × {wide}, not {height} × {width}", "give frames of one size")
    return images


def open_frames(frames: FramesLike) -> Sequence[ImageLike]:
    """All frames, without reading files yet. Raises InputError."""
    if isinstance(frames, np.ndarray):
        return _frames_of_array(frames, "the video")
    if not isinstance(frames, (str, os.PathLike)):
        if not isinstance(frames, Sequence):
            hint = "give a directory, a .npy file, an array or a list"
            raise InputError(f"the frames are of type {type(frames).__name__}", hint)
        return frames
    path = Path(frames)
    if path.is_dir():
        return image_files.list_images(path)
    if path.suffix.lower() == ".npy":
        return _frames_of_array(load_npy(path), str(path))
    if not path.exists():
        raise InputError(f"{path} does not exist", "give a directory of images, or a .npy file")
    hint = f"extract its frames first: mkdir frames && ffmpeg -i {shlex.quote(str(path))} frames/%05d.png"
    raise InputError(f"{path} is neither a directory of images nor a .npy file", hint)


def load_npy(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """The memory-mapped array of a .npy file. Raises InputError: missing, not a .npy file, truncated, or objects."""
    name = os.fspath(path)
    with parsing(name, "is not a readable .npy file", "save a numeric array with numpy.save"):
        array: npt.NDArray[Any] = np.lib.format.open_memmap(name, mode="r")  # never loads Python objects
        return array


def _frames_of_array(array: npt.NDArray[Any], name: str) -> list[npt.NDArray[np.uint8]]:
    if array.dtype != np.uint8 or array.ndim != 4:
        raise InputError(f"{name} is {array.dtype} {list(array.shape)}", "give uint8 (frames, height, width, 3)")
    return list(array)


# value / 255 for each pixel value, computed in float64 and rounded once.
_UNIT = (np.arange(256) / 255.0).astype(np.float32)


def prepare_frames(frames: Sequence[npt.NDArray[Any]], height: int, width: int) -> npt.NDArray[np.float32]:
    """Frames, uint8 (H, W, 3) RGB, as float32 (T, height, width, 3) in [0, 1].

    Each is cropped to its middle square and resized as by OpenCV's INTER_LINEAR. Frames may differ in size. Raises
    InputError: no frames, or a frame that is not an image.
    """
    if len(frames) == 0:
        raise InputError("the list of frames is empty", "give one or more images")
    squares = [_middle_square(image_files.as_image(frame)) for frame in frames]
    return np.stack([_UNIT[image_files.resize_linear(square, height, width)] for square in squares])


def _middle_square(image: RgbImage) -> RgbImage:
    height, width = image.shape[:2]
    side = min(height, width)
    # Each half is rounded down before the subtraction, so an odd remainder may fall on either side.
    top, left = height // 2 - side // 2, width // 2 - side // 2
    return image[top : top + side, left : left + side]
