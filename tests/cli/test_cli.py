# SPDX-License-Identifier: Apache-2.0
"""The commands as users type them, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perceiver_export.exporter import PRESETS

from .commands import COMMAND, fail, perceiver_export, succeed

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "fashion"
    output = succeed("export", FASHION / "checkpoint", "-o", path)
    assert "verified against torch in 3 comparisons" in output
    return path


def test_run_names_the_clothes(bundle: Path) -> None:
    output = succeed("run", bundle, FASHION / "pictures" / "bag.png", FASHION / "pictures" / "trouser.png")

    assert "Bag" in output
    assert "Trouser" in output


def test_run_writes_json(bundle: Path, tmp_path: Path) -> None:
    shown = json.loads(succeed("run", bundle, FASHION / "pictures", "--json", "-o", tmp_path / "answers.json"))

    assert shown == json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert [Path(answer["input"]).suffix for answer in shown["answers"]] == [".png"] * 10
    assert {len(answer["labels"]) for answer in shown["answers"]} == {3}
    assert shown["runtime"]["target"] == "ort-cpu"


def test_validate_gates_by_exit_code(bundle: Path, tmp_path: Path) -> None:
    common: list[str | Path] = [
        "validate",
        bundle,
        "--data",
        FASHION / "test.npz",
        "--samples",
        "300",
        "--against",
        FASHION / "checkpoint",
    ]

    assert "held: --max-drop 1.5" in succeed(*common, "--max-drop", "1.5", "--min-agreement", "98")
    said = fail(*common, "--min-agreement", "99.9")
    assert "undecided: --min-agreement 99.9" in said
    assert "2,995 samples would decide" in said
    result = json.loads(succeed(*common, "--json", "--junit", tmp_path / "gates.xml"))
    assert result["data"]["samples"] == 300
    assert [metric["name"] for metric in result["metrics"]] == ["top-1", "top-5", "agreement", "kl"]
    assert (tmp_path / "gates.xml").read_text(encoding="utf-8").startswith("<?xml")


def test_validate_refuses_what_cannot_be_before_it_runs(bundle: Path, tmp_path: Path) -> None:
    common: list[str | Path] = ["validate", bundle, "--data", FASHION / "test.npz"]

    assert "cannot be written as .pdf" in fail(*common, "--report", tmp_path / "a.pdf")
    assert "cannot be written" in fail(*common, "--junit", tmp_path / "absent" / "gates.xml")
    one_file = tmp_path / "a.md"
    assert "both the JUnit file and the report" in fail(*common, "--junit", one_file, "--report", one_file)
    assert "no target 'tpu'" in fail(*common, "--device", "tpu")
    assert "a gate needs a reference" in fail(*common, "--max-drop", "1")
    for source in ("preset:language-bytes", "lucidrains:model.pt", "tests.cli.small_models:points"):
        said = fail(*common, "--against", source, cwd=FASHION.parents[1])
        assert f"{source} " in said
        assert "hint: give the checkpoint that" in said
    assert "no metric 'epe'" in fail(*common, "--against", bundle, "--metric", "epe", "--max-metric-change", "1")
    assert "a certificate says that a gate held" in fail(*common, "--samples", "5", "--certify")
    assert "two sets of samples" in fail(
        "quantize",
        bundle,
        "--data",
        FASHION / "held_out.npz",
        "-o",
        tmp_path / "int8",
        "--search",
        FASHION / "test.npz",
    )


def test_bench_compares(bundle: Path) -> None:
    result = json.loads(succeed("bench", bundle, "--against", bundle / "model.onnx", "--runs", "20", "--json"))

    assert len(result["measurements"]) == 2
    assert result["ratio"] > 0
    assert "p50" in succeed("bench", bundle, "--runs", "10")


def test_inspect_shows_stages_of_bundle_and_graph(bundle: Path) -> None:
    assert "encoder.self_attentions" in succeed("inspect", bundle)
    assert "encoder.self_attentions" in succeed("inspect", bundle / "model.onnx")
    assert json.loads(succeed("inspect", bundle, "--json"))["manifest"]["task"] == "image-classification"


def test_doctor_and_presets() -> None:
    assert "onnxruntime" in succeed("doctor")
    assert json.loads(succeed("doctor", "--json"))["targets"][0]["target"] == "ort-cpu"
    assert "imagenet-fourier" in succeed("presets")
    assert len(json.loads(succeed("presets", "--json"))) == len(PRESETS)


def test_export_takes_batch_and_shape(tmp_path: Path) -> None:
    output = succeed(
        "export", FASHION / "checkpoint", "-o", tmp_path / "b", "--batch", "1:2:4", "--shape", "image=3x14x20", "--json"
    )
    manifest = json.loads(output)["manifest"]

    assert manifest["parts"]["model"]["inputs"][0]["shape"] == ["batch", 3, 14, 20]
    assert (manifest["preprocessing"]["height"], manifest["preprocessing"]["width"]) == (14, 20)


def test_errors_are_one_line_and_one_hint(bundle: Path, tmp_path: Path) -> None:
    checkpoint = FASHION / "checkpoint"
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()

    assert "already a bundle" in fail("export", checkpoint, "-o", bundle)
    assert "does not exist" in fail("export", tmp_path / "absent", "-o", tmp_path / "x")
    assert "batch" in fail("export", checkpoint, "-o", tmp_path / "x", "--batch", "many")
    assert "--shape" in fail("export", checkpoint, "-o", tmp_path / "x", "--shape", "image")
    assert "not a picture" in fail("run", bundle, tmp_path / "text.png")
    assert "holds no pictures" in fail("run", bundle, tmp_path / "empty")
    assert "no manifest.json" in fail("run", tmp_path, FASHION / "pictures" / "bag.png")
    assert "no target" in fail("run", bundle, FASHION / "pictures" / "bag.png", "--device", "abacus")
    assert "holds no pictures" in fail("validate", bundle, "--data", tmp_path / "empty")
    assert "no manifest.json" in fail("inspect", tmp_path)
    assert "no manifest.json" in fail("bench", tmp_path)
    assert "hint: it looks like a SOURCE: perceiver-export export preset:x" in fail("bench", "preset:x")
    assert "not at" in fail("demo", "--example", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "text.png"]


@pytest.mark.parametrize("arguments", [["export"], ["dance"], ["run", "--loud"], ["bench", "x", "--runs", "many"]])
def test_usage_errors_exit_with_two(arguments: list[str]) -> None:
    assert perceiver_export(*arguments).returncode == 2


@pytest.mark.parametrize("module", ["cli", "cli.main"])
def test_python_runs_it_as_a_module_too(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"perceiver_export.exporter.{module}", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} is not a bundle")


def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "export", "preset:imagenet-fourier", "-o", str(tmp_path / "bundle"), "--shape", "image=3x32x32"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert any(tmp_path.iterdir()), "the export never started to write"
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)

    assert process.returncode == 1
    assert stderr.startswith("error: interrupted\nhint: ")
    assert list(tmp_path.iterdir()) == []


def test_help_and_doctor_load_neither_torch_nor_an_engine() -> None:
    for arguments in (["--help"], ["doctor"], ["export", "--help"]):
        code = (
            "import sys; from perceiver_export.exporter.cli.main import app\n"
            f"try: app({arguments!r})\n"
            "except SystemExit: pass\n"
            "print(sorted({'torch', 'onnx', 'onnxruntime', 'scipy', 'PIL'} & set(sys.modules)), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr == "[]\n"


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['perceiver-export', 'export', 'x', '-o', 'y']\n"
        "from perceiver_export.exporter.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert done.returncode == 1
    assert "needs torch" in done.stderr
    assert "perceiver-export[export]" in done.stderr


def test_the_demo_goes_the_whole_road(tmp_path: Path) -> None:
    output = succeed("demo", "-o", tmp_path / "fashion")

    for expected in (
        "1. export",
        "2. inspect",
        "3. run",
        "4. quantize",
        "5. validate",
        "6. bench",
        "10,000 samples",
        "certified: top-1 drop ≤ 0.6 points and agreement ≥ 97 %",
        "The whole road took",
    ):
        assert expected in output
    assert (tmp_path / "fashion" / "manifest.json").is_file()
    assert (tmp_path / "fashion-int8" / "calibration.json").is_file()
    assert "<svg" in (tmp_path / "fashion-report.html").read_text(encoding="utf-8")
