# SPDX-License-Identifier: Apache-2.0
"""The abilities of each version of TensorRT as one table for the builder and lint; and TensorRT's files in the cache.

Sources: the bindings of 10.3.0, 10.13.3.9, 10.16.1.11 and 11.4.0.106 and of TensorRT for RTX 1.7.1.116 (their
attributes are in tests/runtimes/tensorrt_api.json), NVIDIA's operators.md of each version for opsets.

The user's cache holds timings of builds, and kernels that TensorRT for RTX compiled on this GPU. An engine of TensorRT
for RTX has no kernels for one GPU; it compiles them at the first run. It checks that cached kernels were compiled for
this GPU, and compiles and writes others again.
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
    """A row holds from ``since`` on, up to the next row.

    ``opset``: the newest that its parser is documented to read. ``attention``: whether it has ONNX's operator.
    ``jetpack``: the releases of JetPack that bring it. ``version``: the one that was asked about, (0, 0) in the table.
    """

    library: Literal["tensorrt", "tensorrt-rtx"]
    since: tuple[int, int]
    opset: int
    attention: bool
    jetpack: str
    version: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """TensorRT 10.3: the version that was asked about."""
        label = "TensorRT for RTX" if self.library == "tensorrt-rtx" else "TensorRT"
        return f"{label} {self.version[0]}.{self.version[1]}"

    @property
    def typed_by_flag(self) -> bool:
        """Whether it takes types from the graph only with a flag; later versions always do."""
        return self.library == "tensorrt" and self.version < (11, 0)

    @property
    def shared_weights_crash(self) -> bool:
        """Whether weight-only integers that are used more than once crash it (measured on 1.7.1.116)."""
        return self.library == "tensorrt-rtx" and self.version == (1, 7)


#                library    since  opset Attention JetPack
_TABLE = (
    Capabilities("tensorrt", (10, 3), 20, False, "6.1, 6.2"),
    Capabilities("tensorrt", (10, 9), 22, False, "-"),
    Capabilities("tensorrt", (10, 13), 24, False, "7.0, 7.1"),
    Capabilities("tensorrt", (10, 14), 24, True, "-"),
    Capabilities("tensorrt", (10, 16), 24, True, "7.2"),
    Capabilities("tensorrt", (11, 0), 25, True, "7.2.2 and later"),
    Capabilities("tensorrt-rtx", (1, 7), 25, True, "none"),
)

NEWEST = {"tensorrt": "11.4", "tensorrt-rtx": "1.7"}


def capabilities(library: str, version: str) -> Capabilities:
    """The row for a version such as "10.3.0" or "11.4"; one that the table does not have is like the last before it,
    of the same major version.

    Raises DeviceError: not a version, or one that is too old, too new or was left out.
    """
    numbers = re.match(r"(\d+)(?:\.(\d+))?", version)
    found = (int(numbers[1]), int(numbers[2] or 0)) if numbers else (0, 0)
    rows = [row for row in _TABLE if row.library == library and row.since[0] == found[0] and row.since <= found]
    if not rows:
        known = ", ".join(f"{row.since[0]}.{row.since[1]}" for row in _TABLE if row.library == library)
        raise DeviceError(
            f"{library} {version} is not supported",
            f"supported from: {known}{'; on a Jetson, JetPack 6.1 or later' if library == 'tensorrt' else ''}",
        )
    return replace(rows[-1], version=found)


def table() -> tuple[Capabilities, ...]:
    """Every row."""
    return _TABLE


_MOST = 1 << 30  # bytes of a cache


def read_timings(platform: Platform, config: Any) -> Path:
    """Load the timings of this version and device, so that other builds do not measure again."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{platform.library}-{platform.version}-{platform.device}")
    path = cache_directory() / "timing" / f"{slug}.cache"
    cache = config.create_timing_cache(_read(path)) or config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    return path


def write_timings(path: Path, config: Any) -> None:
    """Keep the timings for the next build."""
    write_cache(path, bytes(config.get_timing_cache().serialize()))


class KernelCache:
    """Kernels of one engine of TensorRT for RTX. ``path`` is the engine's, in a directory that its key names."""

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
        """An execution context that uses the cache's kernels, and adds those that it compiles; None: no memory."""
        return self._engine.create_execution_context(runtime_config=self._config)

    def keep(self) -> None:
        """Write the kernels that the first run of a context added; later runs compile nothing."""
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
