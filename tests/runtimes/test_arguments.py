# SPDX-License-Identifier: Apache-2.0
"""Arguments of the wrong type are one error of this package's, wherever they come in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from perceiver_export.runtimes import Batcher, Runtime, bench, build, load, load_onnx, open_task
from perceiver_export.runtimes.errors import PerceiverExportError
from tests.runtimes.targets import EXPECTED

WRONG: tuple[Any, ...] = (2.5, "2", b"x", ["a"], {1: 2}, {"a": 1, 2: 3}, object(), float("nan"), -1)
IMAGE = np.zeros((1, 3, 28, 28), np.float32)


def wrong(call: Callable[[Any], Any], *but: type) -> None:
    for value in WRONG:
        if not isinstance(value, but):
            with pytest.raises(PerceiverExportError):
                call(value)


def wrong_by_name(call: Callable[..., object], names: str, *but: type, **given: Any) -> None:
    """Each of these keyword arguments, beside those that are given."""
    for name in names.split():
        wrong(lambda value, name=name: call(**{**given, name: value}), *but)  # type: ignore[misc]


def test_of_load(fashion_bundle: Path) -> None:
    wrong(load)
    wrong(load_onnx)
    wrong(open_task)
    wrong_by_name(partial(load, fashion_bundle), "device part threads verify precision hint")
    with pytest.raises(PerceiverExportError):
        load(fashion_bundle, device=None)  # type: ignore[arg-type]


def test_of_build(copied_bundle: Path) -> None:
    wrong(lambda value: build(value, EXPECTED[0]))
    wrong(lambda value: build(copied_bundle, value))
    wrong_by_name(partial(build, copied_bundle, EXPECTED[0]), "precision hint shapes flags")
    assert not (copied_bundle / "engines").exists()


def test_of_bench(fashion_bundle: Path) -> None:
    wrong(bench)
    wrong_by_name(partial(bench, fashion_bundle), "against part device threads precision runs", runs=5)


def test_of_calls(fashion_bundle: Path) -> None:
    with load(fashion_bundle, EXPECTED[0]) as runtime:
        feeds: Any = {"image": IMAGE}
        wrong(runtime.run)
        wrong(lambda value: runtime.submit(value).result())
        wrong(lambda value: runtime.run({**feeds, cast("str", 1): value, "b": value}))
        wrong(lambda value: runtime.run(feeds, out=value))
        wrong(lambda value: runtime.stream([feeds], value))
        wrong(lambda value: list(runtime.stream(value)))
        check_batcher(runtime)


def check_batcher(runtime: Runtime) -> None:
    wrong(lambda value: Batcher(runtime, value))
    wrong(lambda value: Batcher(runtime, 1, value), float)
