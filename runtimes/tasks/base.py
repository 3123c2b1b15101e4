# SPDX-License-Identifier: Apache-2.0
"""What all tasks share: a bundle's parts, opened once and closed together."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from perceiver_export.runtimes.errors import RuntimeClosedError
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.runtime import Runtime

if TYPE_CHECKING:
    from typing_extensions import Self

# None is the whole model; a split bundle's parts are then joined behind one `run`.
LoadPart = Callable[[str | None], Runtime]


class Task:
    """A bundle with the pre- and post-processing of its task. Use it as a context manager, or call `close`."""

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        self.manifest = manifest
        self._load_part = load_part
        self._parts: dict[str | None, Runtime] = {}
        self._closed = False

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes this task."""

    @property
    def split(self) -> bool:
        """Whether the bundle holds encoder and decoder apart."""
        return "encoder" in self.manifest.parts

    @property
    def runtime(self) -> Runtime:
        """The whole model; a split bundle's parts joined."""
        return self.part(None)

    def part(self, name: str | None) -> Runtime:
        """One part of the bundle, loaded at first use; None is the whole model. Raises what `load` raises."""
        if self._closed:
            raise RuntimeClosedError("this task is closed", "call open_task() again")
        if name not in self._parts:
            self._parts[name] = self._load_part(name)
        return self._parts[name]

    def close(self) -> None:
        """Close every part that was loaded. May be called twice."""
        self._closed = True
        for runtime in self._parts.values():
            runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
