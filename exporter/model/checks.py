# SPDX-License-Identifier: Apache-2.0
"""Configs that are checked on construction, before torch builds anything: torch's errors only mention matrices."""

from __future__ import annotations

import functools
from typing import Any, get_type_hints

import msgspec

from perceiver_export.runtimes.errors import UsageError

MOST = 1 << 31  # numbers in one table: 8 GiB, and several times that while it is computed
MOST_LAYERS = 4096  # eighty times the papers' deepest model; each layer is some twenty nodes of a graph
MOST_PARAMETERS = 1 << 33  # 32 GiB in fp32, forty times the papers' largest


class Checked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Checks the type and bounds of each field, which Python does not, then the rules that involve several fields.

    Raises UsageError.
    """

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            try:
                msgspec.convert(getattr(self, name), kind)
            except msgspec.ValidationError as error:
                raise UsageError(f"{name} of {type(self).__name__}: {error}", "correct that field") from error
        self.check()

    def check(self) -> None:
        """Raise UsageError if fields contradict each other."""


@functools.cache
def _kinds(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return get_type_hints(struct, include_extras=True)


def require(holds: bool, message: str, hint: str = "change one of the two") -> None:
    """Raise UsageError unless ``holds``."""
    if not holds:
        raise UsageError(message, hint)


def check_size(what: str, size: int, most: int = MOST) -> None:
    """Raise UsageError if ``size`` is above ``most``."""
    require(size <= most, f"{what} is {size:,}, more than {most:,}", "choose smaller sizes")
