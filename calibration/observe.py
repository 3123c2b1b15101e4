# SPDX-License-Identifier: Apache-2.0
"""The one pass over the data: every part is watched while it runs on the samples, and the data is watched too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perceiver_export.calibration.activations import Statistics
from perceiver_export.calibration.collect import Observer
from perceiver_export.calibration.data_report import DataReport, DataWatch
from perceiver_export.calibration.feeds import ITERABLE, RANDOM, Data, Example, open_feeds
from perceiver_export.calibration.parts import Run, batch_size, batches, run_parts, stack
from perceiver_export.calibration.resume import Progress, kept
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.runtime import Array, Feeds

Report = Callable[[str, int, int], None]

_KEPT = 8  # calls whose feeds and outputs are kept, to measure the effect of quantization on
_RANDOM_SAMPLES = 32


@dataclass(frozen=True)
class Call:
    """Feeds and fp32 outputs of every part in one call."""

    feeds: dict[str, dict[str, Array]]
    outputs: dict[str, dict[str, Array]]


@dataclass(frozen=True)
class Observation:
    """What the pass found: statistics by part, what the data was, and the first few calls."""

    statistics: dict[str, Statistics]
    data: DataReport
    calls: tuple[Call, ...]


def observe(bundle: Bundle, data: Data, samples: int, threads: int | None, report: Report) -> Observation:
    """Run up to ``samples`` samples through all parts. Goes on where an interrupted pass on the same samples stopped.

    Only data that has a name can be gone on with; an iterable starts from its beginning.
    Raises DataError: no samples, or what `open_feeds` raises.
    """
    if str(data) == RANDOM:
        samples = min(samples, _RANDOM_SAMPLES)
    size = batch_size(bundle.manifest)
    progress = Progress(bundle, samples, size)
    go_on = isinstance(data, (str, Path))
    try:
        return _observe(bundle, data, samples, size, progress if go_on else None, threads, report)
    except _DataChangedError:
        progress.clear()
        return _observe(bundle, data, samples, size, progress, threads, report)


class _DataChangedError(Exception):
    """The interrupted pass was on other samples."""


def _observe(
    bundle: Bundle,
    data: Data,
    samples: int,
    size: int,
    progress: Progress | None,
    threads: int | None,
    report: Report,
) -> Observation:
    manifest = bundle.manifest
    examples = open_feeds(data, manifest, samples)
    total = examples.count or samples
    observers = {
        name: Observer(bundle.file(part.file), -(-total // size), threads=threads)
        for name, part in manifest.parts.items()
    }
    statistics = {name: observer.statistics for name, observer in observers.items()}
    watch = DataWatch(manifest, str(data) if isinstance(data, (str, Path)) else ITERABLE)
    calls: list[Call] = []
    generator = np.random.default_rng(0)
    done = progress.load(statistics) if progress is not None else ()
    counted: list[str] = []  # behind the watch by the batch that is running
    with kept(progress, statistics, counted):
        for batch in batches(examples.stream, size):
            known = len(watch.digests) < len(done)
            _see(watch, batch)
            if known and watch.digests != list(done[: len(watch.digests)]):
                raise _DataChangedError
            if not known or len(calls) < _KEPT:
                runs = {name: _run(observer, count=not known) for name, observer in observers.items()}
                feeds, outputs = run_parts(manifest, runs, stack(batch), generator)
                if len(calls) < _KEPT:
                    calls.append(Call(feeds, {name: dict(values) for name, values in outputs.items()}))
            counted[:] = done if known else watch.digests
            if progress is not None and not known:
                progress.save(statistics, counted)
            report("calibrate", len(watch.digests), total)
    if not calls:
        raise DataError("the data holds no samples", "it is empty, or a generator that was used up")
    if progress is not None:
        progress.clear()
    return Observation(statistics, watch.report(), tuple(calls))


def _see(watch: DataWatch, batch: list[Example]) -> None:
    """Each sample once: a short batch was filled up with its own."""
    for example in {id(example): example for example in batch}.values():
        watch.see(example)


def _run(observer: Observer, count: bool) -> Run:
    def run(feeds: Feeds) -> dict[str, Array]:
        return observer.run(feeds, count)

    return run
