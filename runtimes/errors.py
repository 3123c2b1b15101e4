# SPDX-License-Identifier: Apache-2.0
"""Every error that this package raises on purpose.

    PerceiverExportError            message, and a hint that says what to do
    ├── UsageError                  an argument that makes no sense
    ├── CheckpointError             a checkpoint that cannot be read, or does not fit its config
    ├── UnsupportedModelError       a model that this package cannot export
    ├── ExportError                 tracing failed, or the bundle could not be written
    │   └── VerificationError       the exported graph does not give what torch gives
    ├── BundleError                 a bundle that is broken, changed or of another version
    │   └── BundleExistsError       something is already where the bundle should go
    ├── MissingDependencyError      an extra that is not installed
    ├── DeviceError                 a target that is not there, or refuses the model
    ├── EngineError                 a compiled engine that is missing, damaged, or was built for something else
    ├── BuildError                  an engine that could not be compiled or kept
    ├── InputError                  arrays that the model does not take
    ├── DataError                   data (pictures, npz, labels) that cannot be used
    ├── RuntimeClosedError          a call on a closed runtime
    └── GateError                   a measured accuracy outside what was allowed
        ├── UndecidedError          too few samples to say whether it is
        └── BrokenReferenceError    a reference that gives NaN: nothing can be held against it

The command line prints the message and the hint and exits with 1; anything else that is raised is a bug.
"""

from __future__ import annotations


class PerceiverExportError(Exception):
    """Base of all. `message` says what happened and what was found; `hint` what to do about it. A trace shows both."""

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
    """The exported graph does not give what torch gives."""


class BundleError(PerceiverExportError):
    """A bundle that is broken, changed or of another version."""


class BundleExistsError(BundleError):
    """Something is already where the bundle should go."""


class MissingDependencyError(PerceiverExportError):
    """An extra that is not installed."""


class DeviceError(PerceiverExportError):
    """A target that is not there, or refuses the model."""


class EngineError(PerceiverExportError):
    """A compiled engine that is missing, damaged, or was built for something else."""


class BuildError(PerceiverExportError):
    """An engine that could not be compiled or kept."""


class InputError(PerceiverExportError):
    """Arrays that the model does not take."""


class DataError(PerceiverExportError):
    """Data (pictures, npz, labels) that cannot be used."""


class RuntimeClosedError(PerceiverExportError):
    """A call on a closed runtime."""


class GateError(PerceiverExportError):
    """A measured accuracy outside what was allowed."""


class UndecidedError(GateError):
    """Too few samples to say whether a measured accuracy is within what was allowed."""


class BrokenReferenceError(GateError):
    """A reference that gives NaN or infinite values: nothing can be held against it."""


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UsageError(f"{what} is {value!r}", f"it is one of {', '.join(choices)}")
