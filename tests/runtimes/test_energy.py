# SPDX-License-Identifier: Apache-2.0
"""Energy from sensors' files, laid out and in the units of the kernel's drivers. No machine of CI has real ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from perceiver_export.runtimes.energy import Ina3221Meter, RaplMeter, find_meter
from perceiver_export.runtimes.errors import DeviceError


def rapl(sys: Path, *packages: tuple[int, int]) -> list[Path]:
    """Zones as powercap names them, with a sub-zone each, which must not be counted twice."""
    zones = []
    for index, (energy, most) in enumerate(packages):
        for name in (f"intel-rapl:{index}", f"intel-rapl:{index}:0"):
            zone = sys / "class/powercap" / name
            zone.mkdir(parents=True)
            (zone / "energy_uj").write_text(f"{energy}\n")
            (zone / "max_energy_range_uj").write_text(f"{most}\n")
        zones.append(sys / "class/powercap" / f"intel-rapl:{index}")
    return zones


def ina3221(sys: Path, **rails: tuple[int, int]) -> Path:
    hwmon = sys / "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    hwmon.mkdir(parents=True)
    for index, (name, (millivolts, milliamperes)) in enumerate(rails.items(), start=1):
        (hwmon / f"in{index}_label").write_text(f"{name}\n")
        (hwmon / f"in{index}_input").write_text(f"{millivolts}\n")
        (hwmon / f"curr{index}_input").write_text(f"{milliamperes}\n")
    return hwmon


def test_rapl_counts_packages_and_survives_a_wrap(tmp_path: Path) -> None:
    first, second = rapl(tmp_path, (1_000_000, 10_000_000), (9_000_000, 10_000_000))
    meter = find_meter(tmp_path)

    assert isinstance(meter, RaplMeter)
    with meter.measure() as energy:
        time.sleep(0.05)
        (first / "energy_uj").write_text("3500000")
        (second / "energy_uj").write_text("500000")
    assert energy.joules == pytest.approx(2.5 + 1.5)
    assert energy.seconds >= 0.05
    assert energy.watts == pytest.approx(energy.joules / energy.seconds)


def test_an_orin_nanos_total_rail_is_taken_alone(tmp_path: Path) -> None:
    ina3221(tmp_path, VDD_IN=(5000, 2000), VDD_CPU_GPU_CV=(5000, 1000), NC=(0, 0))
    meter = find_meter(tmp_path)

    assert isinstance(meter, Ina3221Meter)
    with meter.measure() as energy:
        time.sleep(0.2)
    assert energy.source == "INA3221, VDD_IN"
    assert energy.watts == pytest.approx(10.0)
    assert energy.joules == pytest.approx(10.0 * energy.seconds)


def test_an_agx_orins_rails_are_added_and_sampled(tmp_path: Path) -> None:
    hwmon = ina3221(tmp_path, VDD_GPU_SOC=(20_000, 100), VDD_CPU_CV=(20_000, 100))

    with find_meter(tmp_path).measure() as energy:
        time.sleep(0.2)
        (hwmon / "curr1_input").write_text("1100")
        time.sleep(0.2)
    assert energy.source == "INA3221, VDD_GPU_SOC + VDD_CPU_CV"
    assert 9 < energy.watts < 19  # 4 W for half of the time, 24 W for the other half


def test_a_machine_without_sensors_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no power rails"):
        find_meter(tmp_path)


def test_a_sensor_that_cannot_be_read_is_told_so(tmp_path: Path) -> None:
    (zone,) = rapl(tmp_path, (1, 10))
    (zone / "energy_uj").write_text("not a number")
    with pytest.raises(DeviceError, match="energy_uj cannot be read"):
        find_meter(tmp_path)
