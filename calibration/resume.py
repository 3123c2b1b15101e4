# SPDX-License-Identifier: Apache-2.0
"""What a calibration pass has seen, kept in the user's cache, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from perceiver_export.calibration.activations import Activation, Hazard, Statistics
from perceiver_export.runtimes.bundle import Bundle, cache_directory
from perceiver_export.runtimes.runtime import Array

_EVERY = 10.0  # seconds between two writes


class Progress:
    """The statistics of all parts after some samples, as a file. Losing it costs only time.

    The key is the bundle's files and everything else that the statistics depend on. Samples are compared by digest:
    where they differ from those of the interrupted pass, it starts again.
    """

    def __init__(self, bundle: Bundle, samples: int, batch: int) -> None:
        files = sorted((name, entry.sha256) for name, entry in bundle.manifest.files.items())
        key = hashlib.sha256(repr((files, samples, batch)).encode()).hexdigest()[:32]
        self._path = cache_directory() / "calibration" / f"{key}.npz"
        self._written = time.monotonic()

    def load(self, statistics: Mapping[str, Statistics]) -> tuple[str, ...]:
        """Fill in the statistics, and give the digests of the samples that they come from; none where there is none."""
        try:
            with np.load(self._path, allow_pickle=False) as arrays:
                content = {name: arrays[name] for name in arrays}
            digests = tuple(str(digest) for digest in content["digests"])
            for part, one in statistics.items():
                _restore(one, part, content)
        except Exception:  # cut, damaged, or of another version: it is a cache
            return ()
        return digests

    def save(self, statistics: Mapping[str, Statistics], digests: list[str], force: bool = False) -> None:
        """Write, at most every ten seconds unless forced."""
        if not digests or (not force and time.monotonic() - self._written < _EVERY):
            return
        self._written = time.monotonic()
        content: dict[str, Array] = {"digests": np.array(digests)}
        for part, one in statistics.items():
            content |= _flat(one, part)
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp.npz")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(temporary, **content)  # type: ignore[arg-type]
            temporary.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):  # a full or read-only home: an interrupted pass starts again
                temporary.unlink()

    def clear(self) -> None:
        """The pass is over."""
        with contextlib.suppress(OSError):
            self._path.unlink()

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self._path


@contextlib.contextmanager
def kept(progress: Progress | None, statistics: Mapping[str, Statistics], digests: list[str]) -> Iterator[None]:
    """Where the block is interrupted, what was seen is written first."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError, MemoryError):
        if progress is not None:
            progress.save(statistics, digests, force=True)
        raise


def _flat(statistics: Statistics, part: str) -> dict[str, Array]:
    flat: dict[str, Array] = {f"{part}|calls": np.array(statistics.calls)}
    for name, one in statistics.activations.items():
        flat |= {f"{part}|{name}|low": one.low, f"{part}|{name}|high": one.high, f"{part}|{name}|rows": one.rows}
        flat[f"{part}|{name}|counts"] = np.array([one.rows_seen, one.rows_kept])
    for name, hazard in statistics.hazards.items():
        flat[f"{part}|{name}|hazard"] = np.array([hazard.largest, hazard.depth])
    return flat


def _restore(statistics: Statistics, part: str, content: Mapping[str, Array]) -> None:
    restored = {}
    for name, one in statistics.activations.items():
        arrays = [content[f"{part}|{name}|{what}"] for what in ("low", "high", "rows")]
        if [array.shape for array in arrays] != [one.low.shape, one.high.shape, one.rows.shape]:
            raise ValueError(name)
        seen, rows = (int(count) for count in content[f"{part}|{name}|counts"])
        restored[name] = Activation(arrays[0], arrays[1], arrays[2], seen, rows)
    statistics.activations.update(restored)
    statistics.calls = int(content[f"{part}|calls"])
    for key in content:
        if key.startswith(f"{part}|") and key.endswith("|hazard"):
            largest, depth = content[key]
            statistics.hazards[key.split("|")[1]] = Hazard(float(largest), int(depth))
