# SPDX-License-Identifier: Apache-2.0
"""Presets, at the papers' widths and one layer, compiled by TensorRT for RTX without a GPU: all of them are a benchmark
(tests/benchmarks/tensorrt_presets.py), at full depth as well.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import onnx_ir as ir
import pytest

from perceiver_export.calibration.lowering.attention import find_attentions
from perceiver_export.calibration.lowering.half import to_half
from perceiver_export.calibration.lowering.lint import lint
from perceiver_export.calibration.lowering.tensorrt import lower_bundle, lower_for_tensorrt
from perceiver_export.exporter.graphs import Batch, whole_model
from perceiver_export.exporter.model.config import AttentionConfig
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.runtimes import build, load
from perceiver_export.runtimes.engines import tensorrt
from perceiver_export.runtimes.engines.backend import EngineOptions, Platform
from perceiver_export.runtimes.engines.cuda import Gpu, cuda_gpus
from perceiver_export.runtimes.errors import BundleError, DeviceError
from tests.benchmarks.tensorrt_presets import compiled
from tests.cli.commands import COMMAND, fail, succeed
from tests.preset_graphs import SMALL_FLOW, preset_config, preset_graphs, quantized, traced
from tests.runtimes.tensorrt_reports import compile_rtx, read_report


@pytest.mark.parametrize(
    ("name", "fold", "fused"),
    [
        ("language-bytes", True, 3),  # heads of 32 and 160, padded
        ("imagenet-fourier", True, 1),
        ("imagenet-fourier", False, 1),  # those of the cross-attentions are 261 and 1024 wide
        (SMALL_FLOW, True, 8),  # two heads at a time
        ("audioset-raw", True, 1),
        ("modelnet40", True, 1),
    ],
)
def test_every_attention_that_can_is_fused_and_every_linear_is_int8(
    name: str, fold: bool, fused: int, tmp_path: Path
) -> None:
    forms, devices = ("fp16", "int8"), ("sm86", "sm89")
    rows = list(compiled(tmp_path, name, 1, 1, fold, forms, devices))

    assert {(row["form"], row["device"]) for row in rows} == {(form, sm) for form in forms for sm in devices}
    for row in rows:
        assert row["held"]
        assert (row["linears"] > 0) == (row["form"] == "int8")
        assert row["seconds of lint"] < 5
    for form in forms:
        assert sum(row["fused"] for row in rows if (row["form"], row["device"]) == (form, "sm86")) == fused


def test_heads_of_unequal_width_are_three_kernels_until_they_are_padded(tmp_path: Path) -> None:
    """With padding, which the test above compiles, all three attentions are fused."""
    (model,) = preset_graphs("language-bytes", 1, 1).values()
    assert [(one.qk, one.v) for one in find_attentions(model.graph)] == [(32, 160), (32, 160), (32, 96)]

    to_half(model, "fp16")
    ir.save(model, tmp_path / "half.onnx", external_data="half.weights")
    assert compile_rtx(tmp_path / "half.onnx", tmp_path / "half").fused_attentions == 0


def test_an_attention_between_int8_products_is_fp16_whatever_its_heads_width(tmp_path: Path) -> None:
    """Heads of 12 the compiler pads itself: a kernel that cuts the answer moves it in int8."""
    config = preset_config("language-bytes", 1, 1)
    attention = AttentionConfig(num_heads=4, num_qk_channels=48, num_v_channels=48)
    encoder = msgspec.structs.replace(
        config.encoder, num_latents=32, num_latent_channels=48, cross_attention=attention, self_attention=attention
    )
    config = msgspec.structs.replace(config, encoder=encoder)
    model = traced(whole_model(PerceiverIO(config).eval(), Batch.parse(1)), config)
    linears = quantized(model)
    lower_for_tensorrt(model, "fp16")
    ir.save(model, tmp_path / "model.onnx", external_data="model.weights")

    report = compile_rtx(tmp_path / "model.onnx", tmp_path / "engine")
    assert report.precisions == {"int8": linears, "fp16": 6}  # two of each attention


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_the_demo_goes_from_bundle_to_engine(precision: str, copied_bundle: Path) -> None:
    flags = ("--precision", precision, "--flag", "compute_capability=sm86,sm89")
    lowered = succeed("build", copied_bundle, "--target", "tensorrt-rtx", "--precision", precision, "--lower-only")
    built = json.loads(succeed("build", copied_bundle, "--target", "tensorrt-rtx", *flags, "--json"))

    assert lowered.startswith(f"tensorrt-{precision}: ")
    (engine,) = built
    report = json.loads((Path(engine["directory"]) / "layers.json").read_text())
    assert report["fused_attentions"] == (0 if precision == "fp32" else 6)  # all self-attentions
    assert report["precisions"].get("int8", 0) == 0
    again = json.loads(succeed("build", copied_bundle, "--target", "tensorrt-rtx", *flags, "--json"))
    assert not again[0]["new"]


def test_a_batch_of_named_size_is_one_engine(batched_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(batched_bundle, tmp_path / "bundle")
    lower_bundle(bundle, "fp16")
    flags = {"compute_capability": "sm86"}
    (engine,) = build(bundle, "tensorrt-rtx", precision="fp16", flags=flags, shapes={"batch": (1, 8, 16)})

    assert not lint(bundle, "tensorrt-rtx")[0].findings
    assert read_report(engine.directory).fused_attentions == 6


def test_without_a_driver_engines_are_built_and_not_run(copied_bundle: Path) -> None:
    if cuda_gpus():
        pytest.skip("there is an NVIDIA driver here")
    build(copied_bundle, "tensorrt-rtx", flags={"compute_capability": "sm86"})

    told = succeed("build", copied_bundle, "--target", "tensorrt-rtx", "--flag", "compute_capability=sm86")
    assert "next: on a machine with such a GPU (sm86): " in told
    with pytest.raises(DeviceError, match="no NVIDIA GPU"):
        load(copied_bundle, "tensorrt-rtx")
    assert "no NVIDIA GPU" in fail("bench", copied_bundle, "--device", "tensorrt-rtx")
    assert "no NVIDIA GPU" in fail("build", copied_bundle, "--target", "tensorrt-rtx")
    assert "needs tensorrt" in fail("build", copied_bundle, "--target", "tensorrt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--precision", "fp16"), "the build is fp16, but the products of model.onnx are fp32"),
        (("--flag", "compute_capability=sm87"), "does not build for 'SM87'"),
        (("--flag", "compute_capability=sm75"), "omit sm75"),
        (("--flag", "compute_capability=sm75", "--precision", "bf16"), "sm75 does not support bf16"),
        (("--flag", "workspace=lots"), "workspace='lots'"),
        (("--flag", "turbo=on"), "'turbo'"),
    ],
)
def test_what_cannot_be_built_says_why(flags: tuple[str, ...], message: str, copied_bundle: Path) -> None:
    devices = () if "compute_capability" in flags[1] else ("--flag", "compute_capability=sm86")

    assert message in fail("build", copied_bundle, "--target", "tensorrt-rtx", *flags, *devices)
    assert not list(copied_bundle.glob("engines/*/*/engine.json"))


def test_a_graph_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x0a nothing")

    with pytest.raises(BundleError, match=r"cannot read model\.onnx"):
        compile_rtx(path, tmp_path / "engine")


def test_ctrl_c_in_a_build_stops_it_and_leaves_nothing(copied_bundle: Path) -> None:
    command = [*COMMAND, "build", str(copied_bundle), "--target", "tensorrt-rtx", "--flag", "compute_capability=sm86"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(copied_bundle.glob("engines/tensorrt-rtx/.*.partial")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)  # it has begun to read the graph
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 1, stderr
    assert stderr.splitlines()[0] == "error: interrupted"
    assert len(stderr.splitlines()) == 2
    assert not list(copied_bundle.glob("engines/*/*/engine.json"))


def test_engines_are_for_the_version_and_the_gpus_that_they_were_built_for() -> None:
    built = tensorrt.platform("tensorrt-rtx", EngineOptions(flags={"compute_capability": "sm89, SM86,sm86"}))
    here = Platform("tensorrt-rtx", "1.7.1.116", "NVIDIA RTX A4000 (sm_86)", driver="13.0")

    assert built.device == "sm86 sm89"
    assert tensorrt.differences(built, here) == ()
    assert tensorrt.differences(here, Platform("tensorrt-rtx", "1.7.1.116", here.device, driver="14.0")) == ()
    other = Platform("tensorrt-rtx", "1.8.0", "NVIDIA GeForce RTX 5090 (sm_120)")
    assert tensorrt.differences(built, other) == (
        "it was built with tensorrt-rtx 1.7.1.116, but this is tensorrt-rtx 1.8.0",
        "it was built for sm86 sm89, but this is NVIDIA GeForce RTX 5090 (sm_120)",
    )


def test_bf16_is_asked_of_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "cuda_gpus", lambda: (Gpu("NVIDIA T4 (sm_75)", (7, 5), 1 << 34),))
    with pytest.raises(DeviceError, match=r"T4 \(sm_75\) does not support bf16"):
        tensorrt.platform("tensorrt-rtx", EngineOptions(precision="bf16"))
    assert tensorrt.platform("tensorrt-rtx", EngineOptions(precision="fp16")).device == "NVIDIA T4 (sm_75)"
