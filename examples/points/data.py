# SPDX-License-Identifier: Apache-2.0
"""Models of Debian's sweethome3d-furniture as point clouds of ten classes, split by model.

apt-get install sweethome3d-furniture
"""

from __future__ import annotations

import itertools
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from examples.points.model import LABELS

Array = npt.NDArray[np.float64]

CATALOGS = Path("/usr/share/sweethome3d/furniture")
# By class: a pattern that the name or tags must contain, and one that they must not contain.
WORDS = {
    "bed": (r"\bbed\b|crib|futon\b", r"sofa|couch|mattress|sleeping|hammock|toy"),
    "cabinet": (
        r"cabinet|bookcase|wardrobe|cupboard|shelves|dresser|\bchest\b",
        r"sink|tv stand|table|hood|living room|freezer",
    ),
    "car": (r"\bcar\b|\bvan\b|truck|\bbus\b", r"model"),
    "chair": (r"\bchair\b|armchair|\bstool\b", r"wheelchair|deck|beach|pool|puff|ottoman|baby"),
    "door or window": (r"\bdoor\b|window", r"blind|cabinet|curtain|shutter|elevator|shower"),
    "lamp": (r"lamp|\blight\b|lantern|chandelier", r"camping|flash|strip|track|fluorescent"),
    "person": (r"\bhuman\b", r"$^"),
    "plant": (r"\btree\b|\bplant\b|flowers|cactus|\bficus\b|palm", r"hedge|box|spray|under snow"),
    "sofa": (r"\bsofa\b|\bcouch\b", r"armchair|opened"),
    "table": (r"\btable\b|\bdesk\b", r"fan|tennis|pool|football|bedside|changing|lamp|cloth|computer|bench|game"),
}
SAMPLED = 4096  # points of a model's surface
TEST, HELD_OUT = 0.35, 0.1  # of the models of a class
TWIN = 0.09  # models of one author count as the same if their clouds, in a cube of side 2, differ by less


@dataclass(frozen=True)
class Model:
    """One model of a catalog: points (4096, 3) of its surface in cm, z up."""

    identity: str
    name: str
    author: str
    label: int
    points: Array


def read_models() -> list[Model]:
    """All models of the ten classes, except those that are nearly the same as an earlier one."""
    if not CATALOGS.is_dir():
        raise SystemExit("the models are missing: apt-get install sweethome3d-furniture")
    found: list[Model] = []
    for model in _models():
        alike = (one for one in found if (one.label, one.author) == (model.label, model.author))
        if all(difference(model.points, one.points) >= TWIN for one in alike):
            found.append(model)
    return found


def _models() -> Iterator[Model]:
    for path in sorted(CATALOGS.glob("*.sh3f")):
        with zipfile.ZipFile(path) as archive:
            entries: dict[int, dict[str, str]] = defaultdict(dict)
            listing = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
            for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*?)\s*$", listing, re.MULTILINE):
                entries[int(number)][key] = value
            for entry in entries.values():
                label = classified(entry)
                if label is not None:
                    seed = zlib.crc32(entry["id"].encode())
                    points = sampled(surface(archive, entry), SAMPLED, np.random.default_rng(seed))
                    yield Model(entry["id"], entry["name"], entry["creator"], label, points)


def classified(entry: dict[str, str]) -> int | None:
    """The class whose words are in the entry's name or tags; None unless there is exactly one."""
    words = f"{entry['name']}, {entry.get('tags', '')}".lower()
    found = [
        index
        for index, (has, lacks) in enumerate(WORDS[label] for label in LABELS)
        if re.search(has, words) and not re.search(lacks, words)
    ]
    return found[0] if len(found) == 1 else None


def surface(archive: zipfile.ZipFile, entry: dict[str, str]) -> Array:
    """The triangles (n, 3, 3) of the entry's OBJ file, turned and scaled as the catalog says."""
    lines = archive.read(entry["model"].lstrip("/")).decode("latin-1").splitlines()
    vertices = np.array([line.split()[1:4] for line in lines if line.startswith("v ")], np.float64)
    triangles = []
    for line in lines:
        if line.startswith("f "):
            corners = [int(corner.split("/")[0]) for corner in line.split()[1:]]
            corners = [index - 1 if index > 0 else len(vertices) + index for index in corners]
            triangles += [(corners[0], *pair) for pair in itertools.pairwise(corners[1:])]
    used = vertices[np.array(triangles)]
    if "modelRotation" in entry:
        used = used @ np.array(entry["modelRotation"].split(), np.float64).reshape(3, 3).T
    low, high = used.min((0, 1)), used.max((0, 1))
    size = np.array([float(entry[side]) for side in ("width", "height", "depth")])
    used = (used - (low + high) / 2) / np.maximum(high - low, 1e-9) * size
    turned: Array = used[..., [0, 2, 1]] * [1, -1, 1]  # from y up to z up
    return turned


def sampled(triangles: Array, count: int, generator: np.random.Generator) -> Array:
    """``count`` points, evenly spread over the surface."""
    a, b, c = triangles.swapaxes(0, 1)
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    chosen = generator.choice(len(triangles), count, p=areas / areas.sum())
    u, v = np.sqrt(generator.random((count, 1))), generator.random((count, 1))
    points: Array = (1 - u) * a[chosen] + u * (1 - v) * b[chosen] + u * v * c[chosen]
    return points


def difference(one: Array, other: Array) -> float:
    """The mean distance to the nearest point of the other cloud (Chamfer), each stretched to a cube of side 2."""
    a, b = (
        2 * (cloud[:512] - cloud.min(0)) / np.maximum(cloud.max(0) - cloud.min(0), 1e-9) - 1 for cloud in (one, other)
    )
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    distances = np.sqrt(np.maximum(squares, 0))
    return float(distances.min(0).mean() + distances.min(1).mean()) / 2


def parts(models: list[Model]) -> dict[str, list[Model]]:
    """train, held_out and test, with the same shares of each class, chosen by a hash of the identity."""
    found: dict[str, list[Model]] = {"train": [], "held_out": [], "test": []}
    for label in range(len(LABELS)):
        own = sorted(
            (model for model in models if model.label == label), key=lambda one: zlib.crc32(one.identity.encode())
        )
        first, second = round(TEST * len(own)), round((TEST + HELD_OUT) * len(own))
        for name, chosen in (("test", own[:first]), ("held_out", own[first:second]), ("train", own[second:])):
            found[name].extend(chosen)
    return found


def turned(points: Array, angle: float) -> Array:
    """The cloud turned about its vertical axis."""
    cos, sin = np.cos(angle), np.sin(angle)
    found: Array = points @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    return found
