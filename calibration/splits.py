# SPDX-License-Identifier: Apache-2.0
"""The three sets of samples that a search needs, which must not share any."""

from __future__ import annotations

from pathlib import Path

from perceiver_export.calibration.examples import open_examples
from perceiver_export.calibration.overlap import check_overlap
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.tasks import open_task


def check_splits(
    bundle: Bundle, calibrate: str | Path, search_on: str | Path, certify_on: str | Path, allowed: bool
) -> tuple[str, ...]:
    """The digests of the samples to search on.

    Raises DataError where two sets share samples, or one repeats them, unless that is ``allowed``.
    """
    with open_task(bundle) as task:
        calibration, searched, certified = (
            [example.digest for example in open_examples(task, data).stream]
            for data in (calibrate, search_on, certify_on)
        )
    check_overlap(searched, frozenset(calibration), str(search_on), allowed)
    check_overlap(certified, frozenset(calibration) | frozenset(searched), str(certify_on), allowed)
    return tuple(searched)
