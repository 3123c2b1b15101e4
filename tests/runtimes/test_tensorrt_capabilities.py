# SPDX-License-Identifier: Apache-2.0
"""The table of what each version of TensorRT can do."""

from __future__ import annotations

import pytest

from perceiver_export.runtimes.engines.tensorrt_versions import TABLE, capabilities
from perceiver_export.runtimes.errors import DeviceError


@pytest.mark.parametrize(("version", "row"), [("10.7.0", (10, 3)), ("10.13.3.9", (10, 13)), ("11.5.0", (11, 0))])
def test_a_version_takes_the_row_at_or_below_it(version: str, row: tuple[int, int]) -> None:
    found = capabilities("tensorrt", version)

    assert found.since == row
    assert found.name == f"TensorRT {'.'.join(version.split('.')[:2])}"


@pytest.mark.parametrize("version", ["8.6.1", "9.2", "10.2.0", "7.1.3", "12.0", "", "ten"])
def test_versions_that_are_not_supported_are_refused(version: str) -> None:
    with pytest.raises(DeviceError, match="is not supported"):
        capabilities("tensorrt", version)


def test_a_version_of_tensorrt_is_none_of_tensorrt_for_rtx() -> None:
    with pytest.raises(DeviceError, match=r"tensorrt-rtx 10\.3 is not supported"):
        capabilities("tensorrt-rtx", "10.3")


def test_every_row_of_the_table_is_sorted_and_grows() -> None:
    rows = [row for row in TABLE if row.library == "tensorrt"]

    assert [row.since for row in rows] == sorted(row.since for row in rows)
    assert [row.opset for row in rows] == sorted(row.opset for row in rows)
