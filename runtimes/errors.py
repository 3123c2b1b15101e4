# SPDX-License-Identifier: Apache-2.0
"""The errors that this package raises deliberately.

    PerceiverExportError            a message, and a hint with the next step
    ├── UsageError                  an invalid argument
    ├── CheckpointError             a checkpoint that cannot be read, or does not match its config
    ├── UnsupportedModelError       a model that this package cannot export
    ├── ExportError                 tracing failed, or the bundle could not be written
    │   └── VerificationError       the exported graph does not reproduce PyTorch's outputs
    ├── BundleError                 a bundle that is damaged, changed or of another version
    │   └── BundleExistsError       the bundle's path already exists
    ├── MissingDependencyError      an extra that is not installed
    ├── DeviceError                 a target that is missing, or cannot run the model
    ├── EngineError                 a compiled engine that is missing, damaged, or was built for something else
    ├── BuildError                  an engine that could not be compiled or kept
    ├── InputError                  arrays that the model does not accept
    │   └── LongTextError           a text with too many tokens for the model
    ├── DataError                   data (images, npz, labels) that cannot be used
    ├── RuntimeClosedError          a call on a closed runtime
    └── GateError                   a measured accuracy outside the allowed range
        ├── UndecidedError          too few samples to decide whether it is in the range
        ├── VacuousGateError        a gate that any model would pass
        └── BrokenReferenceError    a reference that outputs NaN or infinity

The command line prints the message and the hint, and exits with 1. Any other exception is a bug.
"""

from __future__ import annotations

import importlib
import operator
from typing import Any


def printable(text: str) -> str:
    """Text from a file, with control characters escaped, for terminals, reports and configs."""
    import unicodedata

    def shown(character: str) -> str:
        # Zero-width joiners occur in words of many languages; other format characters reverse or hide text.
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"
        hidden = hidden or ord(character) & 0xFFFE == 0xFFFE  # noncharacters, which XML forbids
        return character.encode("unicode_escape", "backslashreplace").decode() if hidden else character

    return "".join(map(shown, text))


class PerceiverExportError(Exception):
    """Base class. `message` says what is wrong, `hint` how to fix it. A traceback shows both."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[type[PerceiverExportError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class UsageError(PerceiverExportError):
    """An invalid argument."""


class CheckpointError(PerceiverExportError):
    """A checkpoint that cannot be read, or does not match its config."""


class UnsupportedModelError(PerceiverExportError):
    """A model that this package cannot export."""


class ExportError(PerceiverExportError):
    """Tracing failed, or the bundle could not be written."""


class VerificationError(ExportError):
    """The exported graph does not reproduce PyTorch's outputs."""


class BundleError(PerceiverExportError):
    """A bundle that is damaged, changed or of another version."""


class BundleExistsError(BundleError):
    """The bundle's path already exists."""


class MissingDependencyError(PerceiverExportError):
    """An extra that is not installed."""


class DeviceError(PerceiverExportError):
    """A target that is missing, or cannot run the model."""


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
    """Too few samples to decide whether a measured accuracy is in the allowed range."""


class VacuousGateError(GateError):
    """A gate that any model would pass, so it proves nothing."""


class BrokenReferenceError(GateError):
    """A reference that outputs NaN or infinity, so nothing can be compared with it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require(module: str, what: str, extra: str) -> Any:
    """Import a library that may be missing.

    Raises MissingDependencyError, which says that ``what`` needs the library and how to install ``extra``.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0].replace("PIL", "Pillow")
        raise MissingDependencyError(
            f"{what} needs {library}, which is not installed", install_command(extra)
        ) from error


def install_command(extra: str) -> str:
    """The command that installs an extra of this package, from where the package itself was installed."""
    import json
    import shlex
    from importlib import metadata
    from urllib.parse import unquote

    # An egg-info in the current folder hides the installed record, and has no direct_url.json.
    found = (one.read_text("direct_url.json") for one in metadata.distributions(name="perceiver-export"))
    origin = json.loads(next(filter(None, found), "{}"))
    if "url" not in origin:  # pip found it by name, and will find it again
        return f"pip install 'perceiver-export[{extra}]'"
    if "dir_info" not in origin:
        vcs, url = origin.get("vcs_info"), origin["url"]
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url
        return f"pip install {shlex.quote(f'perceiver-export[{extra}] @ {url}')}"
    editable = "-e " if origin["dir_info"].get("editable") else ""
    path = unquote(origin["url"]).removeprefix("file://")
    return f"pip install {editable}{shlex.quote(f'{path}[{extra}]')}"


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UsageError(f"{what} cannot be {value!r}", f"use one of {', '.join(choices)}")


def check_kind(what: str, value: object, kind: type | tuple[type, ...], words: str) -> None:
    """Raise UsageError unless ``value`` is an instance of ``kind``; ``words`` names the kind in the hint."""
    if not isinstance(value, kind):
        raise UsageError(f"{what} is of type {type(value).__name__}", f"give {words}")


def check_whole(what: str, value: object, least: int, most: int | None, hint: str) -> None:
    """Raise UsageError unless ``value`` is a whole number from ``least`` to ``most`` (None: no upper limit)."""
    try:
        whole = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        whole = least - 1
    if isinstance(value, bool) or whole < least or (most is not None and whole > most):
        raise UsageError(f"{what} is {value!r}", hint)
