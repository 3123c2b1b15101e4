# SPDX-License-Identifier: Apache-2.0
"""What TensorRT leaves in the user's cache: timings of builds, and kernels that TensorRT for RTX compiled on this GPU.

An engine of TensorRT for RTX has no kernels for one GPU, but what they are made from at their first run. It checks by
itself that what it reads was compiled for here; what was not is compiled and written again.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import threading
from pathlib import Path
from typing import Any

from perceiver_export.runtimes.bundle import cache_directory
from perceiver_export.runtimes.engines.backend import Platform


def read_timings(platform: Platform, config: Any) -> Path:
    """What was measured on this device by this version is not measured again: builds of a fleet, or a second model."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{platform.library}-{platform.version}-{platform.device}")
    path = cache_directory() / "timing" / f"{slug}.cache"
    cache = config.create_timing_cache(_read(path)) or config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    return path


def write_timings(path: Path, config: Any) -> None:
    """Where it cannot be written the next build measures again."""
    _write(path, bytes(config.get_timing_cache().serialize()))


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
        """An execution context that takes kernels from the cache, and puts there what it compiles; None: no memory."""
        return self._engine.create_execution_context(runtime_config=self._config)

    def keep(self) -> None:
        """Write what the first run of a context added; later ones compile nothing."""
        with self._lock:
            content = bytes(self._cache.serialize())
            if len(content) != self._stored:
                _write(self._path, content)
                self._stored = len(content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; a full or read-only home is no error."""
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
