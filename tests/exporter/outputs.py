# SPDX-License-Identifier: Apache-2.0
"""Outputs of bundles beside those of their sources."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from perceiver_export.exporter.verification import TOLERANCE
from perceiver_export.runtimes import Bundle, load
from perceiver_export.runtimes.runtime import Array, Feeds


def assert_close(found: Mapping[str, Array], expected: Mapping[str, Array], share: float = TOLERANCE) -> None:
    """The same outputs, each within ``share`` of its scale."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=share * np.abs(array).max(), err_msg=name)


def assert_bundle_gives(bundle: Bundle, feeds: Feeds, expected: Mapping[str, Array], share: float = TOLERANCE) -> None:
    """A bundle on its default engine gives these outputs."""
    with load(bundle) as runtime:
        assert_close(runtime.run(feeds), expected, share)
