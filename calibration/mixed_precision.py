# SPDX-License-Identifier: Apache-2.0
"""Mixed precision that holds a gate: found on one split of the data, certified on another.

1. **Ladder.** All layers in int8 is the first rung. Layers then go back to higher precision in the order of their
   sensitivity, 1, 2, 4, … of them: first to int8 weights with float activations, on the next rung to float.
2. **Search.** Each rung is held against the fp32 bundle on the search split, and timed, up to the first that holds and
   one more for safety. A rung that is no faster than a safer one is dropped.
3. **Certify.** On the certification split the rungs that are left are tested in a fixed sequence, the safest first,
   each at 5 %, up to the first that does not hold; the fastest that held is kept. The order was fixed before a sample
   of this split was seen, so the chance of certifying any rung that is worse than the margin is 5 % in all, not for
   each (Learn then Test, Angelopoulos et al., arXiv 2110.01052; Pareto Testing, Laufer-Goldshtein et al., 2210.07913).

Neither split may share samples with the other, or with those that ranges were calibrated on.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.calibration.certificate import certify
from perceiver_export.calibration.pipeline import quantize
from perceiver_export.calibration.plan import Scheme
from perceiver_export.calibration.sensitivity import measure_sensitivity
from perceiver_export.calibration.splits import check_splits
from perceiver_export.calibration.targets import validate_targets
from perceiver_export.calibration.validation import Validation
from perceiver_export.calibration.write import new_bundle, refuse_existing
from perceiver_export.runtimes.benchmark import bench
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.certificates import Certificate
from perceiver_export.runtimes.errors import GateError, UsageError

_RUNS = 30
_RANKED_ON = 8  # samples that layers are ranked on: their order is all that is wanted
_BACK: tuple[Scheme, Scheme] = ("int8-weights", "float")

Report = Callable[[str, int, int], None]


class Rung(msgspec.Struct, frozen=True):
    """One mixture: the layers that are not int8, its time as a share of fp32's, what the gates said on each split."""

    precision: dict[str, Scheme]
    time: float
    search: tuple[str, ...]
    certification: tuple[str, ...] = ()


class Found(msgspec.Struct, frozen=True):
    """What was tried, in order, which of it was kept, and the certificates that it has."""

    rungs: tuple[Rung, ...]
    kept: int
    certificates: tuple[Certificate, ...]


def search(
    bundle: str | os.PathLike[str] | Bundle,
    out: str | os.PathLike[str],
    *,
    calibrate: str | Path,
    search_on: str | Path,
    certify_on: str | Path,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    allow_overlap: bool = False,
    progress: Report | None = None,
    **gates: Any,
) -> Found:
    """Write to ``out`` the fastest mixture whose gates (`validate`'s ``max_drop``, ``min_agreement``, …) are certified.

    Raises GateError where no rung holds (nothing is written), UsageError, DataError where splits overlap, and what
    `quantize` and `validate` raise.
    """
    report = progress or (lambda what, done, total: None)
    path = Path(os.path.abspath(out))
    refuse_existing(path, overwrite)
    if not any(gates.get(name) is not None for name in ("max_drop", "min_agreement", "max_metric_change")):
        raise UsageError("a search needs to know what is good enough", "give --max-drop or --min-agreement")
    source = open_bundle(bundle)
    searched = check_splits(source, calibrate, search_on, certify_on, allow_overlap)
    with tempfile.TemporaryDirectory(prefix="perceiver-export-search-") as folder:
        ladder = Ladder(source, calibrate, Path(folder) / path.name, threads, report)
        options = {"against": source, "threads": threads, **gates}
        tried = _climb(ladder, search_on, device, options, report)
        order = fixed_order([rung.time for rung, _ in tried], [_held(rung.search) for rung, _ in tried])
        if not order:
            raise GateError(
                f"no mixture of precisions holds: {tried[-1][0].search[0]}",
                "ask for less, give more samples to search on, or look at `quantize --sensitivity`",
            )
        kept, evidence = certify_in_order(tried, order, certify_on, device, options, report)
        made = certify(tried[kept][1], evidence, searched)
        with new_bundle(path, overwrite) as directory:
            shutil.copytree(tried[kept][1], directory, dirs_exist_ok=True)
    return Found(tuple(rung for rung, _ in tried), kept, made)


def certify_in_order(
    tried: list[tuple[Rung, Path]],
    order: Sequence[int],
    data: str | Path,
    device: str,
    options: Mapping[str, Any],
    report: Report,
) -> tuple[int, tuple[Validation, ...]]:
    """Which rung of ``tried`` is kept, by a fixed sequence on the certification split, and the evidence for it.

    What the gates said is noted in ``tried``. Raises GateError where not even the first of ``order`` holds.
    """
    passed: dict[int, tuple[Validation, ...]] = {}

    def holds(index: int) -> bool:
        report("certify", order.index(index), len(order))
        rung, path = tried[index]
        results = validate_targets(path, data, device, **options)
        said = tuple(str(gate) for result in results for gate in result.gates)
        tried[index] = (msgspec.structs.replace(rung, certification=said), path)
        if _held(said):
            passed[index] = results
        return index in passed

    kept = fixed_sequence(order, holds)
    if kept is None:
        said = tried[order[0]][0].certification
        raise GateError(
            f"what held on the search split could not be certified: {next(one for one in said if not _held([one]))}",
            "give more samples to certify on, or ask for less; nothing was written",
        )
    return kept, passed[kept]


class Ladder:
    """Mixtures in the order of how much goes back, each quantized when it is asked for, under the name of ``out``."""

    def __init__(self, source: Bundle, data: str | Path, out: Path, threads: int | None, report: Report) -> None:
        self._source, self._data, self._out, self._threads, self._report = source, data, out, threads, report
        ranked = measure_sensitivity(source, data, samples=_RANKED_ON, threads=threads, progress=report)
        self.steps = steps([one.group for one in ranked])

    def build(self, index: int) -> Path:
        """The bundle of a rung."""
        path = self._out.parent / f"rung-{index}" / self._out.name
        path.parent.mkdir()
        options: dict[str, Any] = {"precision": self.steps[index], "threads": self._threads, "progress": self._report}
        return quantize(self._source, self._data, path, **options).path


def steps(groups: Sequence[str]) -> list[dict[str, Scheme]]:
    """The rungs for groups in the order of their sensitivity, the worst first."""
    counts = sorted({min(1 << power, len(groups)) for power in range(len(groups).bit_length() + 1)}) if groups else []
    return [{}, *(dict.fromkeys(groups[:count], scheme) for count in counts for scheme in _BACK)]


def fixed_order(times: Sequence[float], held: Sequence[bool]) -> list[int]:
    """The order of certification: the rungs that held on the search split, safest (last) first, faster ones after it.

    A rung that is no faster than a safer one is never worth a test.
    """
    order: list[int] = []
    for index in reversed(range(len(times))):
        if held[index] and (not order or times[index] < times[order[-1]]):
            order.append(index)
    return order


def fixed_sequence(order: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """Test one after the other, each at the full level, up to the first that fails; the last that held, or None."""
    kept = None
    for index in order:
        if not holds(index):
            break
        kept = index
    return kept


def _climb(
    ladder: Ladder, data: str | Path, device: str, options: Mapping[str, Any], report: Report
) -> list[tuple[Rung, Path]]:
    """Rungs up to the first that holds on the search split, and one more."""
    tried: list[tuple[Rung, Path]] = []
    spare = 1
    for index in range(len(ladder.steps)):
        report("search", index, len(ladder.steps))
        path = ladder.build(index)
        results = validate_targets(path, data, device, **options)
        said = tuple(str(gate) for result in results for gate in result.gates)
        # In turn with fp32, so that whatever else the machine does hits both.
        where = device if device != "all" else "auto"
        timed = bench(path, against=options["against"].path, device=where, runs=_RUNS, threads=options["threads"])
        tried.append((Rung(ladder.steps[index], timed.ratio or 1.0, said), path))
        if any(_held(rung.search) for rung, _ in tried):
            if spare == 0:
                break
            spare -= 1
    return tried


def _held(said: Sequence[str]) -> bool:
    return bool(said) and all(text.startswith("held") for text in said)
