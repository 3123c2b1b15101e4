# SPDX-License-Identifier: Apache-2.0
"""Programs that end with work in flight end well; tests/fuzz/exits.py does it many times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.exits import CASES, problem
from tests.runtimes.targets import EXPECTED


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=list(CASES))
def test_a_program_may_end_in_the_middle_of_anything(number: int, case: str, fashion_bundle: Path) -> None:
    assert problem(case, fashion_bundle, EXPECTED[number % len(EXPECTED)]) == ""
