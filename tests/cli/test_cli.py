# SPDX-License-Identifier: Apache-2.0
"""The commands as users type them: answers, files, exit codes; what they refuse is in test_refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from perceiver_export.runtimes import devices, open_bundle
from perceiver_export.runtimes.certificates import certificates
from tests.calibration.asked import pictures
from tests.conftest import FASHION

from .commands import COMMAND, fail, perceiver_export, succeed, unwrapped


def test_run_names_the_clothes_and_writes_json(fashion_bundle: Path, tmp_path: Path) -> None:
    shown = succeed("run", fashion_bundle, FASHION / "images" / "bag.png", FASHION / "images" / "trouser.png")
    assert "Bag" in shown
    assert "Trouser" in shown

    options = ("--json", "-o", tmp_path / "answers.json")
    found = json.loads(succeed("run", fashion_bundle, FASHION / "images", *options))
    assert found == json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert [Path(answer["input"]).suffix for answer in found["answers"]] == [".png"] * 10
    assert {len(answer["labels"]) for answer in found["answers"]} == {3}
    assert found["runtime"]["target"] == "ort-cpu"


def test_an_image_that_cannot_be_read_does_not_cost_the_answers_for_the_others(
    fashion_bundle: Path, tmp_path: Path
) -> None:
    images, written = tmp_path / "images", tmp_path / "answers.json"
    shutil.copytree(FASHION / "images", images)
    (images / "bag.png").write_bytes(b"no image")

    done = perceiver_export("run", fashion_bundle, images, "--json", "-o", written)
    answered = [Path(answer["input"]).name for answer in json.loads(done.stdout)["answers"]]
    assert done.returncode == 1
    assert answered == sorted(path.name for path in images.glob("*.png") if path.name != "bag.png")
    assert json.loads(written.read_bytes()) == json.loads(done.stdout)
    assert f"no answer for 1 of 10 inputs: {images / 'bag.png'} is not" in unwrapped(done.stderr)
    assert "Trouser" in perceiver_export("run", fashion_bundle, images).stdout
    assert "inputs" not in fail("run", fashion_bundle, images / "bag.png")


def test_validate_gates_by_exit_code(fashion_bundle: Path, thousand: Path, tmp_path: Path) -> None:
    common: list[str | Path] = ["validate", fashion_bundle, "--data", thousand]
    common += ["--against", FASHION / "checkpoint", "--samples"]

    assert "PASS top-1 drop ≤ 1.5 points" in succeed(*common, "250", "--max-drop", "1.5", "--min-agreement", "98")
    said = fail(*common, "60", "--min-agreement", "99.9")
    assert "NOT ENOUGH DATA agreement ≥ 99.9 %" in said
    assert "2,995 fresh samples" in said
    result = json.loads(succeed(*common, "60", "--json", "--junit", tmp_path / "gates.xml"))
    assert result["written"] == {"junit": str(tmp_path / "gates.xml")}
    assert result["data"]["samples"] == 60
    assert [metric["name"] for metric in result["metrics"]] == ["top-1", "top-5", "agreement", "kl"]
    assert (tmp_path / "gates.xml").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.usefixtures("one_process")
def test_validate_says_where_it_wrote(copied_bundle: Path, thousand: Path, tmp_path: Path) -> None:
    places = {"report": tmp_path / "r.md", "junit": tmp_path / "j.xml", "save_worst": tmp_path / "worst"}
    files = [("--report", places["report"]), ("--junit", places["junit"]), ("--save-worst", places["save_worst"])]
    against = ("--against", FASHION / "checkpoint", "--min-agreement", "90", "--certify", "--samples", "100")
    command = ("validate", copied_bundle, "--data", thousand, *against)

    output = succeed(*command, *(word for file in files for word in file))
    for place in (*places.values(), copied_bundle / "calibration.json"):
        assert place.exists()
        assert any(line.startswith(f"written: {place} ") for line in unwrapped(output).splitlines())
    shutil.rmtree(places["save_worst"])
    found = json.loads(succeed(*command, *(word for file in files for word in file), "--json"))
    assert found["written"] == {name: str(place) for name, place in places.items()} | {
        "certificate": str(copied_bundle / "calibration.json")
    }
    (certificate,) = found["certificates"]
    assert certificate["claims"][0]["what"] == "agreement"


def test_inspect_shows_stages_of_bundle_and_graph(fashion_bundle: Path) -> None:
    for path in (fashion_bundle, fashion_bundle / "model.onnx"):
        assert "encoder.self_attentions" not in succeed("inspect", path)
        assert "encoder.self_attentions" in succeed("inspect", path, "--layers")
    assert json.loads(succeed("inspect", fashion_bundle, "--json"))["manifest"]["task"] == "image-classification"


def test_export_takes_its_options(tmp_path: Path) -> None:
    options = ("--batch", "1:2:4", "--shape", "image=3x14x20", "--no-fold", "--json")
    manifest = json.loads(succeed("export", FASHION / "checkpoint", "-o", tmp_path / "b", *options))["manifest"]

    (part,) = manifest["parts"].values()
    assert part["inputs"][0]["shape"] == ["batch", 3, 14, 20]
    assert not part.get("folds")
    assert (manifest["preprocessing"]["height"], manifest["preprocessing"]["width"]) == (14, 20)


def test_the_help_of_export_has_the_documentation_of_each_option() -> None:
    shown = " ".join(succeed("export", "--help").replace("│", " ").split())

    assert "--dynamic-queries" in shown
    assert "--split --no-split" in shown.replace("/", " ").replace("  ", " ")
    assert "Samples per call: a number, or a range." in shown
    assert "[default: fold]" in shown


def test_precision_of_layers_is_in_the_help_beside_the_scheme() -> None:
    shown = succeed("quantize", "--help")

    assert shown.index(" Quantization ") < shown.index("--precision") < shown.index(" Engine ")


@pytest.mark.parametrize("module", ["", ".exporter.cli", ".exporter.cli.main"])
def test_python_runs_it_as_a_module_too(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"perceiver_export{module}"]

    assert str(tmp_path) in fail("inspect", tmp_path, command=command)


def test_the_version_is_known_without_an_import_of_the_rest() -> None:
    code = "import sys, perceiver_export; print(perceiver_export.__version__, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == [version("perceiver-export"), "False"]


@pytest.mark.parametrize("typed", ["-h", "validate -h", "presets", "doctor", "inspect B", "run B P", "run B P -q"])
def test_a_pipe_has_80_columns(typed: str, fashion_bundle: Path) -> None:
    places = {"B": fashion_bundle, "P": FASHION / "images"}
    shown = succeed(*(places.get(word, word) for word in typed.split()))

    assert max(map(len, shown.splitlines())) <= 80
    assert "list[" not in shown  # a type of Python
    assert ("note: " in shown or "details: " in shown) <= (not typed.endswith("-q"))


def test_quiet_leaves_the_verdict(fashion_bundle: Path, thousand: Path) -> None:
    common = ("--data", thousand, "--samples", "100", "--against", FASHION / "checkpoint")

    assert len(unwrapped(succeed("validate", fashion_bundle, *common, "--max-drop", "9", "-q")).splitlines()) == 1


def test_the_shell_completes_commands() -> None:
    asked = {"_PERCEIVER_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": "perceiver-export quan", "COMP_CWORD": "1"}

    assert perceiver_export(env={**os.environ, **asked}).stdout.split() == ["quantize"]


def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "export", "preset:imagenet-fourier", "-o", str(tmp_path / "bundle"), "--shape", "image=3x32x32"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not any(tmp_path.iterdir()) and process.poll() is None:  # it ends by itself, on a slow machine late
        time.sleep(0.05)
    assert any(tmp_path.iterdir()), "the export never started to write"
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate()

    assert process.returncode == 1
    assert stderr.startswith("error: interrupted\nhint: ")
    assert list(tmp_path.iterdir()) == []


def test_help_doctor_and_presets_load_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys; from perceiver_export.exporter.cli.main import app\n"
        "for arguments in (['--help'], ['doctor'], ['export', '--help'], ['presets']):\n"
        "    app(arguments, standalone_mode=False)\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'scipy', 'PIL'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stderr == "[]\n"
    assert "modelnet40" in done.stdout


def test_a_full_output_is_one_line(fashion_bundle: Path) -> None:
    for command in (("inspect", fashion_bundle, "--json"), ("presets",)):
        with open("/dev/full", "wb") as full:
            typed = [*COMMAND, *map(str, command)]
            done = subprocess.run(typed, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

        assert done.returncode == 1
        assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


def test_the_list_of_demos_has_each_example() -> None:
    shown = " ".join(succeed("demo", "--list").split())

    for file in FASHION.parent.glob("*/demo.json"):
        assert f"{file.parent.name} " in shown
        assert json.loads(file.read_text(encoding="utf-8"))["shows"] in shown


def test_a_demo_removes_only_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = json.loads((FASHION / "demo.json").read_text(encoding="utf-8"))
    for place in ("mine", "{out}/../mine", "{out}/old"):
        example["steps"] = [{"what": "", "command": f"export nowhere -o {place}"}]
        for made in ("mine", "perceiver-export-demo/old"):
            (tmp_path / made).mkdir(parents=True, exist_ok=True)
        (tmp_path / "demo.json").write_text(json.dumps(example), encoding="utf-8")
        fail("demo", ".")

        assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / "perceiver-export-demo" / "old").exists()


@pytest.mark.usefixtures("untimed", "one_process")
def test_the_demo_goes_the_whole_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = tmp_path / "example"
    shutil.copytree(FASHION, example)
    pictures(example / "test.npz", slice(1500))  # enough of the test images to decide its gates
    monkeypatch.chdir(tmp_path)
    output = succeed("demo", example)
    made = tmp_path / "perceiver-export-demo"

    steps = ("1. export", "2. inspect", "3. run", "4. quantize", "5. validate")
    for expected in (*steps, "1,500 samples", "certificate top-1 drop ≤ 0.6 points and agreement ≥ 97 %"):
        assert expected in output
    assert re.search(r"PASS\b[^:]*: (on \S+ )?fashion-int8 answered ", " ".join(output.split()))
    assert (made / "fashion" / "manifest.json").is_file()
    assert '<td class="bar">' in (made / "report.html").read_text(encoding="utf-8")
    assert len(certificates(open_bundle(made / "fashion-int8"))) == len(devices())
    assert str(made) in fail("demo", "-o", made)
