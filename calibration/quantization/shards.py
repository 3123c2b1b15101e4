# SPDX-License-Identifier: Apache-2.0
"""Statistics of `quantize` in shards: each machine runs a share of the calls; merging them gives those of one pass.

Bounds merge by minimum and maximum. Every shard draws the random numbers of all calls, so it knows which of its rows
one pass would keep. If the engines compute alike, the int8 graphs are the same, bit for bit.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from perceiver_export.calibration.bundles import identity
from perceiver_export.calibration.data.calls import Call, batch_size
from perceiver_export.calibration.data.fingerprints import DataReport
from perceiver_export.calibration.quantization.options import QuantizeOptions
from perceiver_export.calibration.quantization.statistics import KEPT, Activation, Hazard, Observation, Statistics
from perceiver_export.calibration.validation.options import MOST_SHARDS
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.files import decode_json, encode_json, parsing
from perceiver_export.runtimes.machine import cpu_features
from perceiver_export.runtimes.npz import read_npz, write_npz
from perceiver_export.runtimes.runtime import Array

_AGAIN = "run that shard again, with the files and options of the others"
_ABOUT = "about"  # the array with the JSON of `_About`

Arrays = Mapping[str, Array]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """By tensor: how many rows of an activation were seen, and the depth of a hazard."""

    seen: dict[str, int]
    depths: dict[str, int]


class _About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    shard: int
    shards: int
    bundle: str
    package: str
    engine: str
    instruction_set: tuple[str, ...]
    samples: int
    truncate: bool
    data: DataReport
    parts: dict[str, _Part]

    @property
    def alike(self) -> dict[str, object]:
        """By name: everything that shards of one calibration must have in common."""
        return {
            "bundle": self.bundle,
            "number of shards": self.shards,
            "data": (self.samples, self.truncate, msgspec.structs.replace(self.data, source="")),
            "version of perceiver-export": self.package,
            "version of onnxruntime": self.engine,
            "instruction set": self.instruction_set,
            "graph": self.parts,
        }


def write_statistics(
    path: Path, bundle: Bundle, shard: tuple[int, int], options: QuantizeOptions, observation: Observation
) -> None:
    """Write the statistics of shard i of n. Raises DataError if it ran no call, and OSError."""
    import onnxruntime

    arrays: dict[str, Array] = {}
    parts = {}
    for part, found in observation.statistics.items():
        for name, one in found.activations.items():
            if np.isinf(one.low).any():
                raise DataError(f"shard {shard[0]}/{shard[1]} has no samples", "use fewer shards")
            arrays |= {f"{what} {part} {name}": getattr(one, what) for what in ("low", "high", "rows", "own")}
        arrays[f"hazards {part}"] = np.array([one.largest for one in found.hazards.values()])
        seen = {name: one.seen for name, one in found.activations.items()}
        parts[part] = _Part(seen, {name: one.depth for name, one in found.hazards.items()})
    for number, call in zip(range(shard[0] - 1, KEPT, shard[1]), observation.calls, strict=False):
        for part in parts:
            for side, named in (("feed", call.feeds[part]), ("output", call.outputs[part])):
                arrays |= {f"{side} {number} {part} {name}": array for name, array in named.items()}
    about = _About(
        shard=shard[0],
        shards=shard[1],
        bundle=identity(bundle),
        package=importlib.metadata.version("perceiver-export"),
        engine=onnxruntime.__version__,
        instruction_set=cpu_features(),
        samples=options.samples,
        truncate=options.truncate,
        data=observation.data,
        parts=parts,
    )
    arrays[_ABOUT] = np.frombuffer(encode_json(about, indent=0), np.uint8)
    write_npz(path, arrays)


def merge_statistics(bundle: Bundle, files: Sequence[Path], options: QuantizeOptions) -> Observation:
    """The statistics of all shards. Raises DataError if a file cannot be read, does not fit, or is missing."""
    shards: dict[int, tuple[_About, Arrays]] = {}
    for file in files:
        about, arrays = _read(file)
        first = next(iter(shards.values()), (about, arrays))[0]
        for words, value in about.alike.items():
            if value != first.alike[words]:
                raise DataError(f"{file} differs from {files[0]} in its {words}", _AGAIN)
        earlier = shards.setdefault(about.shard, (about, arrays))[1]
        if earlier.keys() != arrays.keys() or not all(np.array_equal(earlier[name], arrays[name]) for name in arrays):
            said = f"{file} and an earlier file of shard {about.shard}/{about.shards} have different results"
            raise DataError(said, "leave one of the two out, and find out why they differ")
    if not shards:
        raise UsageError("no statistics were given", "name their files: quantize BUNDLE --merge part*.npz -o BUNDLE2")
    if first.bundle != identity(bundle):
        raise DataError(f"{files[0]} is not from the bundle {bundle.path}", "give the bundle that the shards ran")
    if (first.samples, first.truncate) != (options.samples, options.truncate):
        raise UsageError(f"the shards used --samples {first.samples}", "give the same --samples and --truncate")
    if missing := [f"{index}/{first.shards}" for index in range(1, first.shards + 1) if index not in shards]:
        raise DataError(f"{len(missing)} shards are missing: {', '.join(missing[:20])}", "run them, and merge again")
    with parsing(str(files[0]), "and the other shards do not fit this bundle", _AGAIN, DataError):
        found = [shards[index][1] for index in sorted(shards)]
        statistics = {name: _merged(name, part, found) for name, part in first.parts.items()}
        everything = {name: array for arrays in found for name, array in arrays.items()}
        return Observation(statistics, first.data, _calls(bundle, everything, first.data.samples))


def _read(file: Path) -> tuple[_About, Arrays]:
    """A shard's description and its arrays. Raises DataError."""
    if file.is_symlink():
        raise DataError(f"{file} cannot be read: it is a link", "name the file itself")
    arrays = read_npz(file, DataError)
    with parsing(str(file), "does not hold statistics", _AGAIN, DataError):
        about = decode_json(arrays.pop(_ABOUT).tobytes(), _About)
        if not 1 <= about.shard <= about.shards <= MOST_SHARDS:
            raise ValueError(f"it is shard {about.shard}/{about.shards}")
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("it contains NaN or infinite numbers")
    return about, arrays


def _merged(name: str, part: _Part, shards: Sequence[Arrays]) -> Statistics:
    """The statistics of one part. Raises ValueError and KeyError if arrays do not fit together."""
    activations = {}
    for tensor, seen in part.seen.items():
        low, high, rows, own = (
            np.stack([arrays[f"{what} {name} {tensor}"] for arrays in shards])
            for what in ("low", "high", "rows", "own")
        )
        if rows.ndim != 3 or low.shape != high.shape or low.shape[1:] != rows.shape[2:]:
            raise ValueError(f"the shapes of {tensor} do not fit together")
        if not (own.sum(axis=0) == (np.arange(own.shape[1]) < seen)).all():
            raise ValueError(f"rows of {tensor} are missing, or several shards gave them")
        owner = own.argmax(axis=0)
        kept = rows[owner, np.arange(len(owner))]
        activations[tensor] = Activation(low.min(axis=0), high.max(axis=0), kept, own.max(axis=0), seen)
    largest = np.max([arrays[f"hazards {name}"] for arrays in shards], axis=0).tolist()
    pairs = zip(part.depths.items(), largest, strict=True)
    return Statistics(activations, {tensor: Hazard(value, depth) for (tensor, depth), value in pairs})


def _calls(bundle: Bundle, arrays: Arrays, samples: int) -> tuple[Call, ...]:
    """The first calls in order, with feeds and outputs of every part. Raises ValueError if one is missing."""

    def side(kind: str, number: int) -> dict[str, dict[str, Array]]:
        keys = {part: f"{kind} {number} {part} " for part in bundle.manifest.parts}
        return {
            part: {name.removeprefix(key): array for name, array in arrays.items() if name.startswith(key)}
            for part, key in keys.items()
        }

    expected = min(KEPT, -(-samples // batch_size(bundle.manifest)))
    calls = tuple(Call(side("feed", number), {**side("output", number)}) for number in range(expected))
    if not all(values for call in calls for values in (*call.feeds.values(), *call.outputs.values())):
        raise ValueError(f"one of the first {expected} calls is missing")
    return calls
