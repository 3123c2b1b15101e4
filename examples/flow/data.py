# SPDX-License-Identifier: Apache-2.0
"""Pairs of frames with known motion, cut from real images: translation, zoom and rotation, in one or two layers.

Frame 0 and frame 1 are both sampled from one image, so that the flow is exact and neither frame is sharper.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample

HERE = Path(__file__).parent
OPENCV = Path("/usr/share/doc/opencv-doc/examples/data")
HEIGHT, WIDTH = 24, 32
MARGIN = 12  # pixels around a tile that motion may bring into view
TRAINING = (
    "skimage:astronaut", "skimage:brick", "skimage:camera", "skimage:coins", "skimage:grass",
    "skimage:hubble_deep_field", "skimage:retina", "aero1.jpg", "aloeL.jpg", "apple.jpg", "board.jpg", "building.jpg",
    "butterfly.jpg", "fruits.jpg", "graf1.png", "home.jpg", "leuvenA.jpg", "orange.jpg", "smarties.png",
    "squirrel_cls.jpg", "starry_night.jpg", "stuff.jpg",
)  # fmt: skip
CALIBRATION = ("skimage:gravel", "skimage:clock")
TEST = ("skimage:chelsea", "skimage:coffee", "skimage:rocket")
skimage_data: Any = importlib.import_module("skimage.data")  # some of its functions have no types
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def read_image(name: str) -> Image.Image:
    """An image of scikit-image's wheel (``skimage:NAME``) or of Debian's opencv-doc, as RGB."""
    if name.startswith("skimage:"):
        return Image.fromarray(getattr(skimage_data, name.removeprefix("skimage:"))()).convert("RGB")
    return Image.open(OPENCV / name).convert("RGB")


def pyramid(names: Sequence[str]) -> list[Tensor]:
    """Each image (3, H, W) in [0, 1], reduced by 2, 3, 4 and 6, if it stays larger than a tile with its margin."""
    least = (HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN)
    levels = []
    for name in names:
        image = read_image(name)
        for factor in (2, 3, 4, 6):
            small = np.asarray(image.reduce(factor), np.float32) / 255
            if small.shape[0] > least[0] and small.shape[1] > least[1]:
                levels.append(torch.from_numpy(small).permute(2, 0, 1))
    return levels


class Warps:
    """A seeded source of batches: frames (B, 2, 3, 24, 32) in [-1, 1] and flows (B, 24, 32, 2) in pixels."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        self.levels = pyramid(names)
        self.random = np.random.default_rng(seed)
        rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
        centre = torch.tensor([(WIDTH - 1) / 2, (HEIGHT - 1) / 2])
        self.points = torch.stack([columns, rows], -1).float() - centre  # x, y around the middle

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(self.random.uniform(low, high, shape)).float()

    def _patches(self, count: int) -> Tensor:
        """Random pieces of random images, as large as a tile with its margin, some mirrored."""
        height, width = HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN
        patches = []
        for _ in range(count):
            level = self.levels[self.random.integers(len(self.levels))]
            top = self.random.integers(level.shape[1] - height + 1)
            left = self.random.integers(level.shape[2] - width + 1)
            patch = level[:, top : top + height, left : left + width]
            patches.append(patch.flip(-1) if self.random.random() < 0.5 else patch)
        return torch.stack(patches)

    def _motions(self, count: int) -> tuple[Tensor, Tensor]:
        """Random affine motions, (B, 2, 2) and (B, 2): up to 4 degrees, 5 % of zoom and 3 pixels."""
        angle, zoom = self._uniform(-4, 4, count) * math.pi / 180, 1 + self._uniform(-0.05, 0.05, count)
        length, direction = 3 * self._uniform(0, 1, count).sqrt(), self._uniform(0, 2 * math.pi, count)
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        matrix = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
        return matrix, torch.stack([length * direction.cos(), length * direction.sin()], -1)

    def _layer(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """One moving layer: both frames (B, 2, 3, H, W), the flow, and where frame 1's pixels were (B, H, W, 2)."""
        (matrix, shift), patches = self._motions(count), self._patches(count)
        phase = self._uniform(-0.5, 0.5, count, 1, 1, 2)
        points, moved = self.points.expand(count, -1, -1, -1), shift[:, None, None]
        flow = points @ matrix.transpose(1, 2)[:, None] + moved - points
        back = (points - moved) @ torch.linalg.inv(matrix).transpose(1, 2)[:, None]
        size = torch.tensor([WIDTH / 2 + MARGIN, HEIGHT / 2 + MARGIN])
        frames = [
            grid_sample(patches, (where + phase) / size, "bicubic", "border", align_corners=False)
            for where in (points, back)
        ]
        return torch.stack(frames, 1), flow, back

    def batch(self, count: int, noise: bool = True) -> tuple[Tensor, Tensor]:
        """``count`` pairs; in about half of them an ellipse of another image moves in front.

        With ``noise`` the exposure of each frame differs by up to 15 %, and both have up to 3 % of noise.
        """
        behind, front = self._layer(count), self._layer(count)
        centre = self._uniform(-0.4, 0.4, count, 1, 1, 2) * torch.tensor([WIDTH, HEIGHT])
        axes = self._uniform(6, 16, count, 1, 1, 2)
        axes[self._uniform(0, 1, count) < 0.5] = 1e-3
        covers = [
            torch.sigmoid(8 * (1 - (((where - centre) / axes) ** 2).sum(-1).clamp(max=99)))
            for where in (self.points.expand(count, -1, -1, -1), front[2])
        ]
        cover = torch.stack(covers, 1)[:, :, None]
        frames = behind[0] * (1 - cover) + front[0] * cover
        flow = torch.where(covers[0][..., None] > 0.5, front[1], behind[1])
        if noise:
            gain, level = self._uniform(0.85, 1.15, count, 2, 1, 1, 1), self._uniform(0, 0.03, count, 1, 1, 1, 1)
            normal = torch.from_numpy(self.random.standard_normal(frames.shape, np.float32))
            frames = frames * gain + level * normal
        return frames.clamp(0, 1) * 2 - 1, flow


def samples(names: Sequence[str], count: int, seed: int) -> dict[str, npt.NDArray[Any]]:
    """``count`` pairs in the form of `validate`: uint8 frames (N, 2, 24, 32, 3) and flow (N, 24, 32, 2)."""
    frames, flow = Warps(names, seed).batch(count)
    pixels = ((frames + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).contiguous()
    return {"frames": pixels.numpy(), "flow": flow.numpy().astype(np.float16)}


def motorcycle() -> tuple[Bytes, Floats]:
    """Middlebury's motorcycle pair at an eighth of its size, (2, 62, 92, 3), and its true flow (62, 92, 2).

    The right image is shifted by 32 pixels first, so that nothing moves by more than a few pixels; flow is NaN where
    the disparity is unknown.
    """
    left, right, disparity = skimage_data.stereo_motorcycle()
    shift, factor = 32, 8
    left, right, disparity = left[:, shift:], right[:, :-shift], disparity[:, shift:]
    height, width = (side // factor for side in disparity.shape)
    blocks = disparity[: height * factor, : width * factor].reshape(height, factor, width, factor)
    flow = np.zeros((height, width, 2), np.float32)
    known = np.isfinite(blocks)
    flow[..., 0] = (shift - np.where(known, blocks, 0).sum((1, 3)) / np.maximum(known.sum((1, 3)), 1)) / factor
    flow[known.mean((1, 3)) < 0.5] = np.nan
    frames = [
        np.asarray(Image.fromarray(one).crop((0, 0, width * factor, height * factor)).reduce(factor))
        for one in (left, right)
    ]
    return np.stack(frames), flow


def motorcycle_tiles() -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The motorcycle pair in tiles: `validate BUNDLE --data examples.flow.data:motorcycle_tiles`."""
    frames, flow = motorcycle()
    for top in (*range(0, flow.shape[0] - HEIGHT, 12), flow.shape[0] - HEIGHT):
        for left in (*range(0, flow.shape[1] - WIDTH, 16), flow.shape[1] - WIDTH):
            rows, columns = slice(top, top + HEIGHT), slice(left, left + WIDTH)
            yield {"frames": frames[:, rows, columns], "flow": flow[rows, columns]}


def write() -> None:
    """Write held_out.npz, test.npz and two frames of opencv-doc's vtest.avi, at a third of its size."""
    av: Any = importlib.import_module("av")
    np.savez_compressed(HERE / "held_out.npz", frames=samples(CALIBRATION, 48, 2)["frames"])
    test = samples(TEST, 144, 1)
    np.savez_compressed(HERE / "test.npz", frames=test["frames"], flow=test["flow"])
    (HERE / "frames").mkdir(exist_ok=True)
    with av.open(str(OPENCV / "vtest.avi")) as file:
        for number, frame in enumerate(file.decode(video=0)):
            if number in (500, 501):
                frame.to_image().reduce(3).crop((40, 32, 232, 176)).save(HERE / "frames" / f"{number}.png")
