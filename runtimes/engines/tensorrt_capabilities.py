# SPDX-License-Identifier: Apache-2.0
"""What each version of TensorRT can do, as one table: builder, lowering and lint read it, nothing is tried out.

Sources: the bindings of 8.6.1, 10.3.0, 10.13.3.9, 10.16.1.11 and 11.4.0.106 and of TensorRT for RTX 1.7.1.116 (their
attributes are in tests/runtimes/tensorrt_api.json), NVIDIA's operators.md of each version for opsets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from perceiver_export.runtimes.errors import DeviceError

Typing = Literal["weak", "strong-flag", "strong"]


@dataclass(frozen=True)
class Capabilities:
    """From ``since`` on, up to the next row.

    ``typing``: ``weak`` takes precision from flags and from each layer, ``strong`` from the graph alone, and
    ``strong-flag`` does so when told to. ``opset``: the newest that its parser is documented to read. ``operators``:
    those of ours that came with a version. ``jetpack``: where a Jetson's owner meets it. ``version``: the one that was
    asked about, (0, 0) in the table.
    """

    library: Literal["tensorrt", "tensorrt-rtx"]
    since: tuple[int, int]
    typing: Typing
    opset: int
    gelu: bool
    attention: bool
    monitor: bool
    jetpack: str
    version: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """TensorRT 10.3: the version that was asked about."""
        label = "TensorRT for RTX" if self.library == "tensorrt-rtx" else "TensorRT"
        return f"{label} {self.version[0]}.{self.version[1]}"

    @property
    def shared_weights_crash(self) -> bool:
        """Whether it falls over weights that alone are integers and are used more than once (measured on 1.7.1.116)."""
        return self.library == "tensorrt-rtx" and self.version == (1, 7)

    @property
    def lowering(self) -> str:
        """The family of lowered graphs that it takes: `tensorrt8` has precision in flags, `tensorrt` in the graph."""
        return "tensorrt8" if self.typing == "weak" else "tensorrt"


#                library    since     typing       opset Gelu Attention monitor JetPack
_TABLE = (
    # 9.x was never on a Jetson; what it can do nobody here has looked up.
    Capabilities("tensorrt", (8, 6), "weak", 17, False, False, False, "6.0"),
    Capabilities("tensorrt", (10, 0), "strong-flag", 20, True, False, True, "-"),
    Capabilities("tensorrt", (10, 3), "strong-flag", 20, True, False, True, "6.1, 6.2"),
    Capabilities("tensorrt", (10, 9), "strong-flag", 22, True, False, True, "-"),
    Capabilities("tensorrt", (10, 13), "strong-flag", 24, True, False, True, "7.0, 7.1"),
    Capabilities("tensorrt", (10, 14), "strong-flag", 24, True, True, True, "-"),
    Capabilities("tensorrt", (10, 16), "strong-flag", 24, True, True, True, "7.2"),
    Capabilities("tensorrt", (11, 0), "strong", 25, True, True, True, "7.2.2 and later"),
    Capabilities("tensorrt-rtx", (1, 7), "strong", 25, True, True, True, "none"),
)

NEWEST = {"tensorrt": "11.4", "tensorrt-rtx": "1.7"}


def capabilities(library: str, version: str) -> Capabilities:
    """The row for a version such as "10.3.0" or "8.6"; one that the table does not have is like the last before it,
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
            f"versions from these on are: {known}{'; on a Jetson, JetPack 6 or 7' if library == 'tensorrt' else ''}",
        )
    return replace(rows[-1], version=found)


def table() -> tuple[Capabilities, ...]:
    """Every row."""
    return _TABLE
