# SPDX-License-Identifier: Apache-2.0
"""Energy as the board itself measures it: Intel's RAPL counters, or the INA3221 sensors of a Jetson.

RAPL (Intel Software Developer's Manual, volume 3B, 15.10) counts microjoules of a CPU package, and wraps. An INA3221
gives millivolts and milliamperes of up to three rails; their product is sampled and integrated.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from perceiver_export.runtimes.errors import DeviceError

_SAMPLE = 0.02  # seconds between two looks at a sensor; an INA3221 of a Jetson averages over a few milliseconds
_TOTAL = "VDD_IN"  # on Orin Nano and NX this rail feeds all the others


@dataclass
class Energy:
    """Joules over seconds, filled in when the measurement ends. ``source`` says what was measured."""

    source: str
    joules: float = field(default=float("nan"))
    seconds: float = field(default=float("nan"))

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds


class Meter(Protocol):
    """Something that measures energy."""

    def measure(self) -> contextlib.AbstractContextManager[Energy]:
        """The energy of what is done inside the block, of the whole board or package, idle part included."""


class RaplMeter:
    """CPU packages as their own counters say; DRAM and GPU are not in it."""

    def __init__(self, zones: tuple[Path, ...]) -> None:
        self._zones = zones

    @contextlib.contextmanager
    def measure(self) -> Iterator[Energy]:
        energy = Energy(f"RAPL, {len(self._zones)} CPU package{'s' if len(self._zones) > 1 else ''}")
        start, before = time.perf_counter(), [_number(zone / "energy_uj") for zone in self._zones]
        yield energy
        energy.seconds = time.perf_counter() - start
        energy.joules = sum(map(self._used, self._zones, before)) / 1e6

    @staticmethod
    def _used(zone: Path, before: int) -> int:
        now = _number(zone / "energy_uj")
        return now - before if now >= before else now - before + _number(zone / "max_energy_range_uj")


class Ina3221Meter:
    """A Jetson's rails: the one that feeds all the others where there is one, else the sum of all."""

    def __init__(self, rails: dict[str, tuple[Path, Path]]) -> None:
        self._rails = {_TOTAL: rails[_TOTAL]} if _TOTAL in rails else rails

    @contextlib.contextmanager
    def measure(self) -> Iterator[Energy]:
        energy = Energy(f"INA3221, {' + '.join(self._rails)}")
        samples: list[tuple[float, float]] = [(time.perf_counter(), self._watts())]
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(_SAMPLE):
                samples.append((time.perf_counter(), self._watts()))

        thread = threading.Thread(target=sample, name="perceiver-export energy", daemon=True)
        thread.start()
        try:
            yield energy
        finally:
            stop.set()
            thread.join()
        samples.append((time.perf_counter(), self._watts()))
        energy.seconds = samples[-1][0] - samples[0][0]
        energy.joules = sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairwise(samples))

    def _watts(self) -> float:
        return sum(_number(volts) * _number(amperes) for volts, amperes in self._rails.values()) / 1e6


def find_meter(sys: Path = Path("/sys")) -> Meter:
    """What measures energy here. Raises DeviceError: nothing does, or only root may read it."""
    rails = _ina3221_rails(sys / "bus/i2c/drivers/ina3221")
    if rails:
        return Ina3221Meter(rails)
    zones = tuple(sorted(zone for zone in (sys / "class/powercap").glob("intel-rapl:*") if zone.name.count(":") == 1))
    if not zones:
        raise DeviceError(
            "this machine has no power rails that could be read (Intel RAPL, or a Jetson's INA3221)",
            "leave --energy out; virtual machines hide them, even where the CPU has them",
        )
    for zone in zones:
        _number(zone / "energy_uj")
    return RaplMeter(zones)


def _ina3221_rails(driver: Path) -> dict[str, tuple[Path, Path]]:
    """Files of voltage and current by the rail's name, of rails that have one and are connected."""
    rails = {}
    for label in sorted(driver.glob("*/hwmon/hwmon*/in*_label")):
        index = label.name.removeprefix("in").removesuffix("_label")
        name = label.read_text(encoding="ascii", errors="replace").strip()
        files = (label.with_name(f"in{index}_input"), label.with_name(f"curr{index}_input"))
        if name != "NC" and all(file.is_file() for file in files):
            rails[name] = files
    return rails


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except PermissionError as error:
        raise DeviceError(
            f"{path} may be read by root only", f"sudo chmod a+r {path}, or leave --energy out"
        ) from error
    except (OSError, ValueError) as error:
        raise DeviceError(f"{path} cannot be read: {error}", "leave --energy out") from error
