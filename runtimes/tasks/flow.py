# SPDX-License-Identifier: Apache-2.0
"""Optical flow: two frames in, the displacement of each pixel of the first frame out.

Frames larger than the model's input are cut into tiles as in DeepMind's notebook, and the tiles' flows are blended. A
tile has the highest weight in its middle. The notebook's grid may contain a tile twice (if a frame is as high as a
tile, every tile; with 716 rows, the lower of two); the notebook runs and counts it twice. Here it runs once and counts
twice, which gives the same sum. For some sizes (such as 1080 × 1920) the last tile but one of the notebook's grid
extends beyond the frame, and the notebook fails. Here that tile is skipped: the others cover the frame with the
requested overlap.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError, UsageError
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.preprocessing import FlowPreprocessing
from perceiver_export.runtimes.split import decode
from perceiver_export.runtimes.tasks import image_files
from perceiver_export.runtimes.tasks.base import LoadPart, Task, check_interface, interface, misfit, steps_of
from perceiver_export.runtimes.tasks.image_files import Color, ImageLike, RgbImage

Size = tuple[int, int]  # height, width
Flow = npt.NDArray[np.float32]  # (height, width, 2): pixels right, pixels down
# Called before each batch of tiles with the number of finished tiles and the number of all tiles.
Progress = Callable[[int, int], None]

# value / 255 · 2 − 1 for each pixel value, computed in float64 and rounded once.
_SIGNED = (np.arange(256) / 255.0 * 2.0 - 1.0).astype(np.float32)


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def shared(self, other: Box) -> Box:
        """The intersection of the two boxes; its height or width is 0 or less if it is empty."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        height = min(self.top + self.height, other.top + other.height) - top
        width = min(self.left + self.width, other.left + other.width) - left
        return Box(top, left, height, width)

    def inside(self, outer: Box) -> tuple[slice, slice]:
        """Rows and columns of this box, counted from the corner of a box that contains it."""
        top, left = self.top - outer.top, self.left - outer.left
        return slice(top, top + self.height), slice(left, left + self.width)


def grid(frame: Size, tile: Size, min_overlap: int) -> list[tuple[int, int]]:
    """(top, left) of every tile, row by row, in the notebook's order and with its repetitions.

    Raises InputError: a frame smaller than a tile; UsageError: an overlap that is negative or not smaller than a tile.
    """
    if not 0 <= min_overlap < min(tile):
        raise UsageError(f"{tile[0]} × {tile[1]} tiles cannot overlap by {min_overlap}", f"give 0 to {min(tile) - 1}")
    if frame[0] < tile[0] or frame[1] < tile[1]:
        found = f"the frames have {frame[0]} × {frame[1]} pixels, but the model needs at least {tile[0]} × {tile[1]}"
        raise InputError(found, "scale both frames up, and divide the flow by the same factor")
    rows, columns = (
        [*[*range(0, whole, part - min_overlap)][:-1], whole - part] for whole, part in zip(frame, tile, strict=True)
    )
    return [(row, column) for row in rows for column in columns]


def tiles(frame: Size, tile: Size, min_overlap: int) -> dict[Box, int]:
    """The tiles of `grid` that are inside the frame, with the number of times that the grid contains each.

    Raises what `grid` raises.
    """
    lowest, rightmost = frame[0] - tile[0], frame[1] - tile[1]
    corners = grid(frame, tile, min_overlap)
    return Counter(Box(top, left, *tile) for top, left in corners if top <= lowest and left <= rightmost)


def tile_weights(tile: Size) -> npt.NDArray[np.float32]:
    """The weight of each pixel of a tile, (height, width): its distance to the nearest border, at least 1."""
    rows, columns = (np.minimum(np.arange(size) + 1, size - np.arange(size)) for size in tile)
    return np.minimum.outer(rows, columns).astype(np.float32)


def stitch(region: Box, tile: Size, flows: Iterable[tuple[Box, int, Flow]]) -> Flow:
    """The weighted mean of the tiles' flows in a region, (height, width, 2).

    ``flows``: each tile, the number of times that it counts, and the flow in its intersection with the region.
    """
    weights = tile_weights(tile)[:, :, None]
    total = np.zeros((region.height, region.width, 2), np.float32)
    weight = np.zeros((region.height, region.width, 1), np.float32)
    for box, times, flow in flows:
        part = region.shared(box)
        own, target = weights[part.inside(box)] * np.float32(times), part.inside(region)
        total[target] += flow * own
        weight[target] += own
    return total / weight


class OpticalFlow(Task):
    """``flow(frame0, frame1)`` -> float32 (H, W, 2): how far each pixel of frame0 moves right and down, in pixels.

    A frame is a path, a Pillow image, or a uint8 array (H, W) or (H, W, 3), at least as large as the model's input.
    Arrays are RGB; with ``color="bgr"`` they are BGR, as OpenCV reads them.
    """

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        steps = steps_of(manifest, FlowPreprocessing)
        self.tile = (steps.height, steps.width)
        self.min_overlap = steps.min_overlap
        self._batch = interface(manifest)[0][0].limits(0)

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a model of optical flow."""
        steps = steps_of(manifest, FlowPreprocessing)
        height, width = steps.height, steps.width
        if not 0 <= steps.min_overlap < min(height, width):
            raise misfit(f"tiles of {height} × {width} cannot overlap by {steps.min_overlap}")
        check_interface(manifest, {"frames": (2, 3, height, width)}, {"flow": (height, width, 2)})
        if "encoder" in manifest.parts:
            _check_decoder(manifest, height * width)

    def __call__(
        self, frame0: ImageLike, frame1: ImageLike, progress: Progress | None = None, color: Color = "rgb"
    ) -> Flow:
        """The flow of the whole frame, float32 (H, W, 2), blended from overlapping tiles.

        Raises InputError: a frame that cannot be read, frames of different sizes, or frames smaller than a tile.
        """
        pair = _pair(_named(frame0, "the first frame", color), _named(frame1, "the second frame", color))
        return self._flow(pair, None, progress)

    def region(
        self,
        frame0: ImageLike,
        frame1: ImageLike,
        top: int,
        left: int,
        height: int,
        width: int,
        progress: Progress | None = None,
        color: Color = "rgb",
    ) -> Flow:
        """The part of the whole flow in one rectangle, float32 (height, width, 2).

        Only tiles that intersect the rectangle are run, and a split bundle decodes only the rectangle's pixels.

        Raises InputError as the call does, and if the rectangle is empty or extends beyond the frame.
        """
        pair = _pair(_named(frame0, "the first frame", color), _named(frame1, "the second frame", color))
        rows, columns = pair.shape[1:3]
        if min(top, left) < 0 or min(height, width) < 1 or top + height > rows or left + width > columns:
            asked = f"a region of {height} × {width} from row {top}, column {left}"
            hint = "give a region of 1 × 1 or larger inside the frame; rows and columns count from 0"
            raise InputError(f"{asked} is not in a frame of {rows} × {columns}", hint)
        return self._flow(pair, Box(top, left, height, width), progress)

    def frames(
        self,
        frames: str | os.PathLike[str] | Iterable[ImageLike],
        progress: Progress | None = None,
        color: Color = "rgb",
    ) -> Iterator[Flow]:
        """The flow from each frame to the next, for a directory's images in the order of their names, or for a list.

        Each pair is computed when the iterator reaches it. Raises InputError: fewer than two frames; and what the call
        raises.
        """
        listed = image_files.list_images(frames) if isinstance(frames, (str, os.PathLike)) else frames
        if image_files.is_image(listed) or isinstance(listed, Sequence):
            _check_count(1 if image_files.is_image(listed) else len(cast("Sequence[ImageLike]", listed)))
        return self._consecutive(listed, progress, color)

    def _consecutive(self, frames: Iterable[ImageLike], progress: Progress | None, color: Color) -> Iterator[Flow]:
        before: _Frame | None = None
        count = 0
        for count, frame in enumerate(frames, 1):
            after = _named(frame, f"frame {count - 1}", color)
            if before is not None:
                yield self._flow(_pair(before, after), None, progress)
            before = after
        _check_count(count)

    def _flow(self, pair: RgbImage, region: Box | None, progress: Progress | None) -> Flow:
        """The flow of two frames (2, H, W, 3) in a region (None: everywhere), from the tiles that intersect it."""
        whole = Box(0, 0, *pair.shape[1:3])
        every = tiles(whole[2:], self.tile, self.min_overlap)
        wanted = {box: times for box, times in every.items() if min(box.shared(region or whole)[2:]) > 0}
        decoded = self.split and region is not None
        return stitch(region or whole, self.tile, self._flows(pair, wanted, region or whole, decoded, progress))

    def _flows(
        self, pair: RgbImage, wanted: dict[Box, int], region: Box, decoded: bool, progress: Progress | None
    ) -> Iterator[tuple[Box, int, Flow]]:
        """Each tile, how often it counts, and its flow in the region: cut from the tile's whole flow or, with
        ``decoded``, decoded for that part only. Short batches are padded.
        """
        least, most = self._batch
        for start in range(0, len(wanted), most):
            if progress is not None:
                progress(start, len(wanted))
            chunk = list(wanted)[start : start + most]
            padded = chunk + chunk[-1:] * (least - len(chunk))
            crops = np.stack([pair[(slice(None), *box.inside(Box(0, 0, 0, 0)))] for box in padded])
            # float32 (B, 2, 3, h, w) in [-1, 1]
            frames = np.ascontiguousarray(_SIGNED[crops.transpose(0, 1, 4, 2, 3)])
            places = [box.shared(region).inside(box) for box in padded]
            if decoded:
                found = self._decoded(frames, places)
            else:
                flows = self.runtime.run({"frames": frames})["flow"]
                found = [flow[place] for flow, place in zip(flows, places, strict=True)]
            yield from zip(chunk, [wanted[box] for box in chunk], found, strict=False)

    def _decoded(self, frames: npt.NDArray[np.float32], places: Sequence[tuple[slice, slice]]) -> list[Flow]:
        """The flow at one place of each tile. Smaller places are padded with queries of their last pixel."""
        latents = self.part("encoder").run({"frames": frames})["latents"]
        pixels = np.arange(self.tile[0] * self.tile[1], dtype=np.int32).reshape(self.tile)
        chosen = [pixels[place] for place in places]
        longest = max(one.size for one in chosen)
        queries = np.stack([np.pad(one.ravel(), (0, longest - one.size), mode="edge") for one in chosen])
        rows = decode(self.part("decoder"), {"frames": frames, "latents": latents}, queries, num_queries=pixels.size)
        return [row[: one.size].reshape(*one.shape, 2) for row, one in zip(rows, chosen, strict=True)]


_Frame = tuple[str, RgbImage]


def _named(frame: ImageLike, name: str, color: Color) -> _Frame:
    """A frame's pixels with its path, or ``name`` if it has none."""
    return os.fspath(frame) if isinstance(frame, (str, os.PathLike)) else name, image_files.take_image(frame, color)


def _check_count(frames: int) -> None:
    if frames < 2:
        raise InputError(f"flow needs two frames, but got {frames}", "give two or more frames of the same size")


def _pair(first: _Frame, second: _Frame) -> RgbImage:
    """Both frames in one array, (2, H, W, 3)."""
    if first[1].shape != second[1].shape:
        sizes = [f"{name} has {frame.shape[0]} × {frame.shape[1]} pixels" for name, frame in (first, second)]
        raise InputError(", ".join(sizes), "give two frames of one video, of the same size")
    return np.stack([first[1], second[1]])


def _check_decoder(manifest: Manifest, pixels: int) -> None:
    """Raise BundleError unless the split bundle's decoder can compute flow at chosen pixels."""
    decoder = manifest.parts.get("decoder")
    takes = {} if decoder is None else {spec.name: spec.shape for spec in decoder.inputs}
    gives = [] if decoder is None else [(spec.name, spec.shape[2:]) for spec in decoder.outputs]
    fits = takes.keys() == {"latents", "frames", "queries"} and gives == [("flow", (2,))]
    if decoder is None or not fits or decoder.num_queries not in (None, pixels):
        raise misfit("the decoder cannot compute flow at chosen pixels")
