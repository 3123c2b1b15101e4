# SPDX-License-Identifier: Apache-2.0
"""A table of what each TensorRT version supports, for the builder and lint; and TensorRT's files in the user's cache.

Sources: the bindings of 10.3.0, 10.13.3.9, 10.16.1.11 and 11.4.0.106 and of TensorRT for RTX 1.7.1.116 (their
attributes are in tests/runtimes/tensorrt_api.json), and for opsets NVIDIA's operators.md of each version.

The cache holds timings from builds, and kernels that TensorRT for RTX compiled on this GPU. An engine of TensorRT for
RTX contains no kernels: it compiles them at the first run. It checks that cached kernels were compiled for this GPU;
if not, it compiles and writes them again.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from perceiver_export.runtimes.engines.backend import Platform
from perceiver_export.runtimes.errors import DeviceError
from perceiver_export.runtimes.files import cache_directory, read_bytes, write_cache


@dataclass(frozen=True)
class Capabilities:
    """A row applies from version ``since`` up to the next row.

    ``opset``: the newest that its parser is documented to read. ``version``: the version in question, (0, 0) in the
    table.
    """

    library: Literal["tensorrt", "tensorrt-rtx"]
    since: tuple[int, int]
    opset: int
    version: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Product and version, such as TensorRT 10.3."""
        label = "TensorRT for RTX" if self.library == "tensorrt-rtx" else "TensorRT"
        return f"{label} {self.version[0]}.{self.version[1]}"

    @property
    def typed_by_flag(self) -> bool:
        """Whether it needs a flag to take types from the graph; later versions always take them."""
        return self.library == "tensorrt" and self.version < (11, 0)

    @property
    def shared_weights_crash(self) -> bool:
        """Whether it crashes on weight-only integers that are used more than once (measured on 1.7.1.116)."""
        return self.library == "tensorrt-rtx" and self.version == (1, 7)


TABLE = (
    Capabilities("tensorrt", (10, 3), 20),  # JetPack 6.1 and 6.2
    Capabilities("tensorrt", (10, 9), 22),
    Capabilities("tensorrt", (10, 13), 24),  # JetPack 7.0 and 7.1
    Capabilities("tensorrt", (10, 14), 24),
    Capabilities("tensorrt", (10, 16), 24),  # JetPack 7.2
    Capabilities("tensorrt", (11, 0), 25),  # JetPack 7.2.2 and later
    Capabilities("tensorrt-rtx", (1, 7), 25),
)

NEWEST = {"tensorrt": "11.4", "tensorrt-rtx": "1.7"}


def capabilities(library: str, version: str) -> Capabilities:
    """The row for a version such as "10.3.0" or "11.4". A version without a row takes the last row before it of the
    same major version.

    Raises DeviceError: not a version, or one that is too old, too new or unsupported.
    """
    numbers = re.match(r"(\d+)(?:\.(\d+))?", version)
    found = (int(numbers[1]), int(numbers[2] or 0)) if numbers else (0, 0)
    rows = [row for row in TABLE if row.library == library and row.since[0] == found[0] and row.since <= found]
    if not rows:
        known = ", ".join(f"{row.since[0]}.{row.since[1]}" for row in TABLE if row.library == library)
        jetson = ", on a Jetson with JetPack 6.1 or later" if library == "tensorrt" else ""
        raise DeviceError(f"{library} {version} is not supported", f"install {known} or a later minor version{jetson}")
    return replace(rows[-1], version=found)


_MOST = 1 << 30  # bytes of a cache file


def read_timings(platform: Platform, config: Any) -> Path:
    """Load the timings of this version and device into ``config``, and return their file."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{platform.library}-{platform.version}-{platform.device}")
    path = cache_directory() / "timing" / f"{slug}.cache"
    cache = config.create_timing_cache(_read(path)) or config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    return path


def write_timings(path: Path, config: Any) -> None:
    """Write the timings, so that the next build need not measure again."""
    write_cache(path, bytes(config.get_timing_cache().serialize()))


class KernelCache:
    """Cached kernels of one TensorRT for RTX engine at ``path``, whose directory is named after the engine's key."""

    def __init__(self, engine: Any, path: Path) -> None:
        self._engine = engine
        self._path = cache_directory() / "kernels" / f"{path.parent.name}.cache"
        self._config = engine.create_runtime_config()
        self._cache = self._config.create_runtime_cache()
        content = _read(self._path)
        self._stored = len(content) if content and self._cache.deserialize(content) else 0
        self._config.set_runtime_cache(self._cache)
        self._lock = threading.Lock()

    def context(self) -> Any:
        """An execution context that uses the cache's kernels and adds those it compiles; None: too little memory."""
        return self._engine.create_execution_context(runtime_config=self._config)

    def keep(self) -> None:
        """Write the kernels that a context's first run added; later runs compile nothing."""
        with self._lock:
            content = bytes(self._cache.serialize())
            if len(content) != self._stored:
                write_cache(self._path, content)
                self._stored = len(content)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _MOST)
    except OSError:
        return b""
