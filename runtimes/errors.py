# SPDX-License-Identifier: Apache-2.0
"""The errors that this package raises on purpose.

    PerceiverExportError            a message, and a hint with the next step
    ├── UsageError                  an argument that makes no sense
    ├── CheckpointError             a checkpoint that cannot be read, or does not fit its config
    ├── UnsupportedModelError       a model that this package cannot export
    ├── ExportError                 tracing failed, or the bundle could not be written
    │   └── VerificationError       the exported graph does not reproduce PyTorch's outputs
    ├── BundleError                 a bundle that is broken, changed or of another version
    │   └── BundleExistsError       something is already where the bundle should go
    ├── MissingDependencyError      an extra that is not installed
    ├── DeviceError                 a target that is missing, or refuses the model
    ├── EngineError                 a compiled engine that is missing, damaged, or was built for something else
    ├── BuildError                  an engine that could not be compiled or kept
    ├── InputError                  arrays that the model does not accept
    │   └── LongTextError           a text with too many tokens for the model
    ├── DataError                   data (images, npz, labels) that cannot be used
    ├── RuntimeClosedError          a call on a closed runtime
    └── GateError                   a measured accuracy outside the allowed range
        ├── UndecidedError          too few samples to say whether it is
        └── BrokenReferenceError    a reference that gives NaN: nothing can be compared with it

The command line prints the message and the hint and exits with 1; anything else that is raised is a bug.
"""

from __future__ import annotations

import importlib
import operator
from typing import Any


def printable(text: str) -> str:
    """Text from a file for terminals, reports and configs: with control characters escaped."""
    import unicodedata

    def shown(character: str) -> str:
        # Zero-width joiners are part of many languages' words; other format characters reverse or hide text.
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"
        hidden = hidden or ord(character) & 0xFFFE == 0xFFFE  # not characters; XML may not hold them
        return character.encode("unicode_escape", "backslashreplace").decode() if hidden else character

    return "".join(map(shown, text))


class PerceiverExportError(Exception):
    """Base of all. `message` says what is wrong, `hint` how to fix it. A traceback shows both."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[type[PerceiverExportError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class UsageError(PerceiverExportError):
    """An argument that makes no sense."""


class CheckpointError(PerceiverExportError):
    """A checkpoint that cannot be read, or does not fit its config."""


class UnsupportedModelError(PerceiverExportError):
    """A model that this package cannot export."""


class ExportError(PerceiverExportError):
    """Tracing failed, or the bundle could not be written."""


class VerificationError(ExportError):
    """The exported graph does not reproduce PyTorch's outputs."""


class BundleError(PerceiverExportError):
    """A bundle that is broken, changed or of another version."""


class BundleExistsError(BundleError):
    """Something is already where the bundle should go."""


class MissingDependencyError(PerceiverExportError):
    """An extra that is not installed."""


class DeviceError(PerceiverExportError):
    """A target that is missing, or refuses the model."""


class EngineError(PerceiverExportError):
    """A compiled engine that is missing, damaged, or was built for something else."""


class BuildError(PerceiverExportError):
    """An engine that could not be compiled or kept."""


class InputError(PerceiverExportError):
    """Arrays that the model does not accept."""


class LongTextError(InputError):
    """A text with too many tokens for the model."""


class DataError(PerceiverExportError):
    """Data (images, npz, labels) that cannot be used."""


class RuntimeClosedError(PerceiverExportError):
    """A call on a closed runtime."""


class GateError(PerceiverExportError):
    """A measured accuracy outside the allowed range."""


class UndecidedError(GateError):
    """Too few samples to say whether a measured accuracy is in the allowed range."""


class VacuousGateError(GateError):
    """A gate that any model would pass, so that it shows nothing."""


class BrokenReferenceError(GateError):
    """A reference that gives NaN or infinite values: nothing can be compared with it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require(module: str, what: str, install: str) -> Any:
    """Import a library that may be missing. Raises MissingDependencyError: ``what`` needs it, ``install`` gets it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0].replace("PIL", "Pillow")
        raise MissingDependencyError(f"{what} needs {library}, which is not installed", install) from error


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UsageError(f"{what} is {value!r}", f"it is one of {', '.join(choices)}")


def check_kind(what: str, value: object, kind: type | tuple[type, ...], words: str) -> None:
    """Raise UsageError unless ``value`` is of a kind; ``words`` name the kind."""
    if not isinstance(value, kind):
        raise UsageError(f"{what} is a {type(value).__name__}", f"give {words}")


def check_whole(what: str, value: object, least: int, most: int | None, hint: str) -> None:
    """Raise UsageError unless ``value`` is a whole number within limits."""
    try:
        whole = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        whole = least - 1
    if isinstance(value, bool) or whole < least or (most is not None and whole > most):
        raise UsageError(f"{what} is {value!r}", hint)
