# SPDX-License-Identifier: Apache-2.0
"""``module:function``: code of the user's own, seen from the directory where the command is typed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from perceiver_export.runtimes.errors import DataError, PerceiverExportError, UsageError


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """As in `python -m`; what was not on the path before is not on it afterwards."""
    if "" in sys.path:
        yield
        return
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it away itself
            sys.path.remove("")


def find_function(spec: str) -> Callable[..., Any]:
    """What ``module:function`` names. Raises UsageError: it cannot be imported, or is not callable."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except PerceiverExportError:
        raise
    except SystemExit as error:  # or the command would end here, with 0 as if its gates held
        raise UsageError(
            f"{spec} cannot be imported: its module ends the program",
            "put what it does as a script under `if __name__ == '__main__':`",
        ) from error
    except Exception as error:  # a module may raise anything while it is imported
        raise UsageError(
            f"{spec} cannot be imported: {error}", "give module:function, seen from this directory"
        ) from error
    if not callable(found):
        raise UsageError(f"{spec} is of type {type(found).__name__}", "give a function")
    function: Callable[..., Any] = found
    return function


def call_function(spec: str) -> Iterator[Any]:
    """The samples that ``module:function`` gives. Raises DataError where it cannot be imported, fails, or gives no
    iterable.
    """
    with current_directory_importable():  # while it gives samples too: it may import as it goes
        try:
            samples = find_function(spec)()
        except UsageError as error:
            raise DataError(error.message, error.hint) from error
        except PerceiverExportError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(f"{spec} failed: {error!r}", "it takes no argument and yields dicts of arrays") from error
        yield from samples_of(samples, spec)


def samples_of(items: Iterable[Any], where: str) -> Iterator[Any]:
    """The same items. Raises DataError where there are none to go through, or the code that gives them fails."""
    try:
        iterator = iter(items)
    except TypeError as error:
        raise DataError(f"{where} gives no iterable: {error}", "it yields dicts of arrays") from error
    index = 0
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except PerceiverExportError:
            raise
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise DataError(f"{where} failed at sample {index}: {error!r}", "mend the function") from error
        yield item
        index += 1
