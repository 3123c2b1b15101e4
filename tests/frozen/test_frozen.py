# SPDX-License-Identifier: Apache-2.0
"""Nothing that the commands say or write changes unless it is meant to, and the product does not grow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from perceiver_export.runtimes.machine import saturates
from tests.frozen.answers import ANSWERS, SYSTEMS, answer
from tests.frozen.size import RECORD, measured

ALIKE = 0.02  # of the value: kernels of another CPU round otherwise


@pytest.mark.usefixtures("untimed")  # speeds are none of the answers
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_commands_answer_as_they_did(system: str, tmp_path: Path) -> None:
    expected, found = json.loads(ANSWERS.read_bytes()), json.loads(json.dumps(answer(system, tmp_path)))
    assert expected.keys() == SYSTEMS.keys()
    if saturates():  # this CPU does not run the 8-bit weights of the record
        assert found.pop("validate")["error"] == "DeviceError"
        del expected[system]["validate"]
    assert list(differences("", expected[system], found)) == []


def differences(where: str, expected: Any, found: Any, scale: float = 0.0) -> Iterator[str]:
    """Every place where both differ, with both values. ``scale``: of the two numbers whose difference is compared."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in sorted(expected.keys() | found.keys()):
            of = expected["reference"]["value"] if key == "worsening" and expected["reference"] else scale
            yield from differences(f"{where}/{key}", expected.get(key, "nothing"), found.get(key, "nothing"), of)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, pair in enumerate(zip(expected, found, strict=True)):
            yield from differences(f"{where}[{index}]", *pair, scale)
    elif isinstance(expected, float) and isinstance(found, (int, float)):
        if found != pytest.approx(expected, rel=ALIKE, abs=max(1e-5, ALIKE * abs(scale))):
            yield f"{where}: {expected} was, {found} is"
    elif expected != found:
        yield f"{where}: {expected!r} was, {found!r} is"


def test_the_product_does_not_grow() -> None:
    """Lower the record with every step that makes it smaller: `python -m tests.frozen.size`."""
    recorded, found = json.loads(RECORD.read_bytes()), measured()
    for name, most in recorded.items():
        assert found[name] <= most, f"{found[name]} {name}, recorded {most}"
