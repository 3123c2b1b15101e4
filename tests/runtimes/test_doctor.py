# SPDX-License-Identifier: Apache-2.0
"""Doctor and devices say what is here; what other systems have is read from files as those systems write them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from perceiver_export.runtimes import devices, diagnosis, doctor, machine
from perceiver_export.runtimes.engines.backend import TARGETS, find_target
from perceiver_export.runtimes.engines.cuda import Gpu
from perceiver_export.runtimes.errors import DeviceError, install_command
from perceiver_export.runtimes.presence import Device, Presence, presence_apart
from tests.runtimes.targets import EXPECTED


@pytest.fixture(autouse=True, scope="module")
def asked_once() -> Iterator[None]:
    """Each target is asked in a process of its own, which knows of nothing that these tests replace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnosis, "presence_apart", functools.cache(presence_apart))
        yield


def test_doctor_finds_what_is_here_and_says_how_to_get_the_rest() -> None:
    findings = {finding.what: finding for finding in doctor()}

    for target in EXPECTED:
        assert " on " in findings[f"target {target}"].found
        assert findings[f"target {target}"].fix == ""
    for finding in findings.values():
        if finding.found == "not installed":
            assert finding.fix
    assert {f"target {name}" for name in TARGETS} <= findings.keys()


def test_devices_are_the_targets_that_run_here_in_the_order_of_auto() -> None:
    assert [device.target for device in devices() if device.target in EXPECTED] == list(EXPECTED)
    assert all(device.engine and device.name for device in devices())


def test_every_row_of_the_table_can_be_asked_for_and_says_how_it_is_installed() -> None:
    assert list(TARGETS)[-2:] == ["ort-cpu", "openvino-cpu"]
    for name, target in TARGETS.items():
        assert find_target(name) is target
        assert target.install == install_command(target.extra) + target.from_index
    assert find_target("ort-coreml").module == "ort"
    for name in ("", "auto", "ort-", "ort-cpu ", "ort-../x", "openvino-tpu", "ORT-CPU"):
        with pytest.raises(DeviceError, match="there is no target"):
            find_target(name)


def test_a_jetson_is_known_by_its_release_file(tmp_path: Path) -> None:
    release = tmp_path / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed\n")

    assert machine.jetson_linux(release) == "36.4.3"
    assert machine.jetson_linux(tmp_path / "none") == ""


def test_hardware_is_found_on_the_bus_with_a_driver_or_without(tmp_path: Path) -> None:
    for name, vendor, kind in (("0000:01:00.0", "0x10de", "0x030000"), ("0000:00:0b.0", "0x8086", "0x120000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")

    assert machine.pci_devices("0x10de", "0x03", tmp_path)
    assert machine.pci_devices("0x8086", "0x12", tmp_path)
    assert not machine.pci_devices("0x8086", "0x03", tmp_path)


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ('NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n', "sudo ubuntu-drivers install"),
        ('ID=debian\nVERSION_ID="13"\n', "sudo apt install nvidia-driver"),
        ('ID="rhel"\nID_LIKE="fedora"\n', "sudo dnf install akmod-nvidia"),
        ("ID=arch\n", "install nvidia-driver with this system's package manager"),
    ],
)
def test_a_fix_is_the_command_of_this_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, command: str
) -> None:
    """A machine with an NVIDIA card that nobody installed a driver for."""
    (tmp_path / "os-release").write_text(release)
    family = machine.linux_distribution(tmp_path / "os-release")
    monkeypatch.setattr(diagnosis, "linux_distribution", lambda: family)
    monkeypatch.setattr(diagnosis, "cuda_gpus", lambda: ())
    monkeypatch.setattr(diagnosis, "pci_devices", lambda vendor, kind: vendor == "0x10de")
    findings = {finding.what: finding for finding in doctor()}

    assert findings["NVIDIA GPU"].found == "present, without a working driver"
    assert findings["NVIDIA GPU"].fix == findings["target ort-cuda"].fix == command


def test_tensorrt_for_rtx_compiles_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "cuda_gpus", lambda: ())
    monkeypatch.setattr(diagnosis, "pci_devices", lambda vendor, kind: False)
    pytest.importorskip("tensorrt_rtx")  # not where the runtime alone is tested
    findings = {finding.what: finding for finding in doctor()}

    assert "can build for other machines" in findings["target tensorrt-rtx"].found
    assert findings["target tensorrt"].found == findings["target ort-cuda"].found == "no NVIDIA GPU"
    assert find_target("tensorrt").install.endswith("[tensorrt]' --extra-index-url https://pypi.nvidia.com")


def test_a_target_is_shown_by_its_whole_name_and_a_wrong_gpu_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")  # not where the runtime alone is tested
    monkeypatch.setattr(diagnosis, "cuda_gpus", lambda: (Gpu("Orin (sm_87)", (8, 7), 1 << 33),))
    found = []
    for answer in (
        Presence(Device("tensorrt-rtx", "RTX A4000 (sm_86)", "tensorrt-rtx 1.7.1.116")),
        Presence(None, "not for Orin (sm_87)", "use --target tensorrt here"),
    ):
        monkeypatch.setattr(diagnosis, "presence_apart", lambda target, answer=answer: answer)
        found += [one for one in doctor() if one.what == "target tensorrt-rtx"]

    assert found[0].found == "tensorrt-rtx 1.7.1.116 on RTX A4000 (sm_86)"
    assert (found[1].found, found[1].fix) == ("not for Orin (sm_87)", "use --target tensorrt here")


def test_a_device_file_that_may_not_be_opened_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "pci_devices", lambda vendor, kind: vendor == "0x8086")
    monkeypatch.setattr(diagnosis, "device_files", lambda pattern: (str(tmp_path / "renderD128"),))
    findings = {finding.what: finding for finding in doctor()}

    assert "no permission to open" in findings["Intel GPU"].found
    assert "usermod -aG render" in findings["target openvino-gpu"].fix
    monkeypatch.setattr(diagnosis, "device_files", lambda pattern: ())
    assert "without a kernel driver" in {finding.what: finding for finding in doctor()}["Intel NPU"].found
