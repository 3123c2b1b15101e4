# SPDX-License-Identifier: Apache-2.0
"""Two frames in, how far each pixel of the first moves out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import BundleError, InputError
from perceiver_export.runtimes.flow_tiles import Box, Flow, Stitching, Tile, tiles
from perceiver_export.runtimes.frame_files import take_picture
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.pictures import Picture, picture_files
from perceiver_export.runtimes.preprocessing import FlowPreprocessing
from perceiver_export.runtimes.queries import decode
from perceiver_export.runtimes.runtime import Feeds
from perceiver_export.runtimes.tasks.base import LoadPart, Task
from perceiver_export.runtimes.tasks.graphs import check_interface, interface, limits

# A path, or uint8 (H, W) or (H, W, 3).
FrameLike = str | os.PathLike[str] | npt.NDArray[Any]
# Told before each batch of tiles how many tiles are done, and of how many.
Progress = Callable[[int, int], None]

# A pixel's value / 255 · 2 − 1 in float64, rounded once.
_SIGNED = (np.arange(256) / 255.0 * 2.0 - 1.0).astype(np.float32)


class OpticalFlow(Task):
    """``flow(frame0, frame1)`` -> float32 (H, W, 2): how far each pixel of frame0 moves right and down, in pixels.

    A frame is a path or uint8 (H, W, 3), and may be of any size that the model fits into.
    """

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        steps = manifest.preprocessing
        assert isinstance(steps, FlowPreprocessing)  # `check` came first
        self.tile = (steps.height, steps.width)
        self.min_overlap = steps.min_overlap
        self._batch = limits(interface(manifest)[0][0], 0)

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a model of optical flow."""
        steps = manifest.preprocessing
        if not isinstance(steps, FlowPreprocessing) or not 0 <= steps.min_overlap < min(steps.height, steps.width):
            raise BundleError("the manifest does not say how frames are cut into tiles", "export the bundle again")
        height, width = steps.height, steps.width
        check_interface(manifest, {"frames": (2, 3, height, width)}, {"flow": (height, width, 2)})
        if "encoder" in manifest.parts:
            _check_decoder(manifest, height * width)

    def __call__(self, frame0: FrameLike, frame1: FrameLike, progress: Progress | None = None) -> Flow:
        """The flow of the whole frame, from tiles that overlap, each weighed most in its middle.

        Raises InputError: a frame that cannot be read, frames of different sizes, or smaller than a tile.
        """
        pair = _pair(_named(frame0, "the first frame"), _named(frame1, "the second frame"))
        return self._flow(pair, Box(0, 0, *pair.shape[1:3]), False, progress)

    def region(
        self,
        frame0: FrameLike,
        frame1: FrameLike,
        top: int,
        left: int,
        height: int,
        width: int,
        progress: Progress | None = None,
    ) -> Flow:
        """The same values as in the whole flow, for one rectangle only: float32 (height, width, 2).

        Tiles that do not meet it are not run, and a split bundle decodes only the rectangle's pixels of the others.

        Raises InputError as the call does, and where the rectangle is empty or reaches beyond the frame.
        """
        pair = _pair(_named(frame0, "the first frame"), _named(frame1, "the second frame"))
        rows, columns = pair.shape[1:3]
        if min(top, left) < 0 or min(height, width) < 1 or top + height > rows or left + width > columns:
            raise InputError(
                f"a region of {height} × {width} from row {top}, column {left} is not in a frame of {rows} × {columns}",
                "rows and columns count from 0; a region is 1 × 1 or larger",
            )
        return self._flow(pair, Box(top, left, height, width), self.split, progress)

    def frames(
        self, frames: str | os.PathLike[str] | Iterable[FrameLike], progress: Progress | None = None
    ) -> Iterator[Flow]:
        """The flow from each frame to the next: of a directory's pictures in the order of their names, or of a list.

        One pair is computed at a time, when it is asked for. Raises InputError: fewer than two frames, or what the
        call raises.
        """
        listed = picture_files(frames) if isinstance(frames, (str, os.PathLike)) else frames
        if isinstance(listed, Sequence):
            _check_count(len(listed))
        return self._consecutive(listed, progress)

    def _consecutive(self, frames: Iterable[FrameLike], progress: Progress | None) -> Iterator[Flow]:
        before: _Frame | None = None
        count = 0
        for frame in frames:
            after = _named(frame, f"frame {count}")
            count += 1
            if before is not None:
                pair = _pair(before, after)
                yield self._flow(pair, Box(0, 0, *pair.shape[1:3]), False, progress)
            before = after
        _check_count(count)

    def _flow(self, pair: Picture, region: Box, by_queries: bool, progress: Progress | None) -> Flow:
        """Flow of a region of two frames (2, H, W, 3), from all tiles that meet it, in full batches."""
        wanted = [tile for tile in tiles(pair.shape[1:3], self.tile, self.min_overlap) if tile.box.shared(region)]
        stitching = Stitching(region, self.tile)
        least, most = self._batch
        for start in range(0, len(wanted), most):
            if progress is not None:
                progress(start, len(wanted))
            chunk = wanted[start : start + most]
            padded = chunk + chunk[-1:] * (least - len(chunk))
            run = self._decoded if by_queries else self._cropped
            for tile, flow in zip(chunk, run(_feeds(pair, padded), padded, region), strict=False):
                stitching.add(tile, flow)
        return stitching.flow()

    def _cropped(self, feeds: Feeds, chunk: Sequence[Tile], region: Box) -> list[Flow]:
        """Each tile's flow from the whole model, as much of it as lies in the region."""
        flows = self.runtime.run(feeds)["flow"]
        return [flow[_shared(tile, region).inside(tile.box)] for tile, flow in zip(chunk, flows, strict=True)]

    def _decoded(self, feeds: Feeds, chunk: Sequence[Tile], region: Box) -> list[Flow]:
        """The same from encoder and decoder; no other pixel is decoded."""
        latents = self.part("encoder").run(feeds)["latents"]
        parts = [_shared(tile, region) for tile in chunk]
        pixels = np.arange(self.tile[0] * self.tile[1], dtype=np.int32).reshape(self.tile)
        queries = [pixels[part.inside(tile.box)].ravel() for tile, part in zip(chunk, parts, strict=True)]
        longest = max(map(len, queries))
        rows = np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in queries])
        found = decode(self.part("decoder"), {**feeds, "latents": latents}, rows, num_queries=pixels.size)
        return [
            row[: part.height * part.width].reshape(part.height, part.width, 2)
            for row, part in zip(found, parts, strict=True)
        ]


_Frame = tuple[str, Picture]


def _named(frame: FrameLike, name: str) -> _Frame:
    """A frame's pixels, and what to call it: its path where it has one."""
    return os.fspath(frame) if isinstance(frame, (str, os.PathLike)) else name, take_picture(frame)


def _check_count(frames: int) -> None:
    if frames < 2:
        raise InputError(f"frames given: {frames}", "flow goes from frame to frame: give two or more, of the same size")


def _pair(first: _Frame, second: _Frame) -> Picture:
    """Both frames in one array, (2, H, W, 3)."""
    if first[1].shape != second[1].shape:
        sizes = [f"{name} has {frame.shape[0]} × {frame.shape[1]} pixels" for name, frame in (first, second)]
        raise InputError(", ".join(sizes), "give two frames of one video, of the same size")
    return np.stack([first[1], second[1]])


def _feeds(pair: Picture, chunk: Sequence[Tile]) -> dict[str, npt.NDArray[np.float32]]:
    """The model's input, float32 (B, 2, 3, h, w) in [-1, 1]."""
    whole = Box(0, 0, *pair.shape[1:3])
    crops = np.stack([pair[(slice(None), *tile.box.inside(whole))] for tile in chunk])
    return {"frames": np.ascontiguousarray(_SIGNED[crops.transpose(0, 1, 4, 2, 3)])}


def _shared(tile: Tile, region: Box) -> Box:
    part = tile.box.shared(region)
    assert part is not None  # only tiles that meet the region are run
    return part


def _check_decoder(manifest: Manifest, pixels: int) -> None:
    """Raise BundleError unless the split bundle's parts take and give what a region of interest needs."""
    decoder = manifest.parts.get("decoder")
    takes = {} if decoder is None else {spec.name: spec.shape for spec in decoder.inputs}
    gives = [] if decoder is None else [(spec.name, spec.shape[2:]) for spec in decoder.outputs]
    fits = takes.keys() == {"latents", "frames", "queries"} and gives == [("flow", (2,))]
    if decoder is None or not fits or decoder.num_queries not in (None, pixels):
        raise BundleError("the decoder does not give flow for pixels that are asked for", "export the bundle again")
