# SPDX-License-Identifier: Apache-2.0
"""What commands refuse: one `error:` line and one `hint:` line with the datum that is wrong, and nothing written."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from perceiver_export.exporter.cli.output import check_output
from perceiver_export.runtimes.errors import UsageError, install_command
from tests.conftest import FASHION

from .commands import fail, perceiver_export, succeed, unwrapped

# B is a bundle, C its checkpoint, D its test data, P an image, T a folder with text.png, empty/ and layers.json.
RUN, BUILD, QUANTIZE, VALIDATE = "run B P", "build B --target", "quantize B -o T/int8 --data", "validate B --data D"
REFUSED: list[tuple[str, list[str]]] = [
    ("export C -o B", ["--overwrite"]),
    ("export T/absent -o T/x", ["T/absent"]),
    ("export C/model.safetensors -o T/x", ["hint: export C"]),
    ("export C -o T/x --batch many", ["batch", "'many'"]),
    ("export C -o T/x --shape image", ["--shape", "'image'"]),
    ("export C -o T/x --shape image=3xyes", ["--shape", "3xyes"]),
    ("export C -o T/x --no-fold --memory-budget 1GB", ["--memory-budget"]),
    ("export C -o T/x --memory-budget much", ["--memory-budget", "'much'"]),
    ("run B T/text.png", ["text.png"]),
    ("run B T/empty", ["empty"]),
    ("run B", ["IMAGE"]),
    ("run B P --text hello", ["--text"]),
    ("run T P", ["no manifest.json"]),
    (f"{RUN} --device abacus", ["abacus"]),
    (f"{RUN} --device all", ["'all'", "hint: give one of tensorrt, tensorrt-rtx, "]),
    (f"{RUN} --top 0", ["top is 0"]),
    (f"{RUN} -o P", ["bag.png"]),
    (f"{RUN} -o B/manifest.json", ["manifest.json", "B"]),
    (f"{RUN} -o T/answers.png", ["hint: name a file that does: T/answers.json"]),
    (f"{RUN} -o T/answers", ["hint: name a file that does: T/answers.json"]),
    (f"{RUN} -o .", ["hint: name a file that does: NAME.json"]),
    (f"{RUN} -o /", ["hint: name a file that does: /NAME.json"]),
    (f"{RUN} -o T", ["hint: name a file that does: T/NAME.json"]),
    (f"{RUN} -o T/absent/a.json", ["T/absent/a.json"]),
    ("validate B --data T/empty", ["empty"]),
    (f"{VALIDATE} --report T/a.pdf", [".pdf"]),
    (f"{VALIDATE} --junit T/absent/gates.xml", ["absent"]),
    (f"{VALIDATE} --junit T/a.md --report T/a.md", ["a.md"]),
    (f"{VALIDATE} --junit B/manifest.json", [".xml"]),
    (f"{VALIDATE} --junit B/gates.xml", ["gates.xml", "B"]),
    (f"{VALIDATE} --save-worst B/worst", ["worst", "B"]),
    (f"{VALIDATE} --device tpu", ["'tpu'"]),
    (f"{VALIDATE} --max-drop 1", ["reference"]),
    (f"{VALIDATE} --against preset:language-bytes", ["preset:language-bytes", "hint: give the checkpoint that"]),
    (f"{VALIDATE} --against deepmind:language:model.pt", ["model.pt", "hint: "]),
    (f"{VALIDATE} --against tests.cli.small_models:points", ["hint: give the checkpoint that"]),
    (f"{VALIDATE} --against fashoin", ["fashoin", "hint: give the directory of a bundle"]),
    (f"{VALIDATE} --against B --metric epe --max-metric-change 1", ["'epe'"]),
    (f"{VALIDATE} --samples 5 --certify", ["--max-drop"]),
    (f"{VALIDATE} --samples 300 --against C --min-agreement 0.97", ["0.97", "did you mean 97?"]),
    ("validate B", ["--data"]),
    ("validate --data D", ["BUNDLE"]),
    (f"{VALIDATE} --shard 3/2 --scores T/part.json", ["'3/2'", "1/16"]),
    (f"{VALIDATE} --shard 1/2", ["--scores"]),
    (f"{VALIDATE} --shard 1/2 --scores T/part.npz", [".json"]),
    (f"{VALIDATE} --shard 1/2 --scores T/part.json --against C --max-drop 1", ["--merge"]),
    (f"{VALIDATE} --shard 1/2 --scores T/part.json --junit T/a.xml", ["--junit", "--merge"]),
    (f"{VALIDATE} --shard 1/2 --scores T/part.json --save-worst T/worst", ["--save-worst"]),
    (f"{VALIDATE} --shard 1/2 --scores T/part.json --allow-overlap", ["--allow-overlap", "--merge"]),
    (f"{VALIDATE} --shard 1/2 --scores T/part.json --seed 1", ["--seed 1", "--sequential"]),
    ("validate B T/layers.json --merge", ["T/layers.json"]),
    ("validate B T/absent.json --merge", ["T/absent.json"]),
    ("validate B --merge", ["part*.json"]),
    ("validate --merge T/layers.json", ["BUNDLE --merge"]),
    (f"{VALIDATE} --merge", ["--data"]),
    (f"{VALIDATE} T/layers.json", ["layers.json", "--against", "--merge"]),
    (f"{VALIDATE} --sequential", ["--sequential", "--max-drop"]),
    ("validate --plan", ["--max-drop"]),
    *(
        (f"validate --plan --max-drop 1 {more}", [more.split()[0]])
        for more in ("--sequential", "--certify", "--junit T/a.xml", "--data D", "--metric top-1")
    ),
    ("validate B --plan --max-drop 1", ["BUNDLE"]),
    (f"{VALIDATE} --flips 2%", ["--flips", "--plan"]),
    ("validate --plan --max-drop 1 --flips many", ["'many'"]),
    ("validate --plan --max-drop 1 --flips 101", ["101"]),
    ("quantize B --data D", ["-o BUNDLE2"]),
    ("quantize B -o T/int8", ["--data"]),
    ("quantize B --merge -o T/int8", ["part*.npz"]),
    ("quantize B T/layers.json --merge -o T/int8", ["layers.json"]),
    ("quantize B --data D --shard 1/2 -o T/int8", ["-o"]),
    ("quantize B --data D --shard 1/2", ["--statistics"]),
    (f"{QUANTIZE} D --search D", ["two sets", "--certify"]),
    (f"{QUANTIZE} D --certify D", ["two sets", "--search"]),
    *((f"{QUANTIZE} D {option}", [option.split()[0]]) for option in ("--device ort-cpu", "--allow-overlap")),
    (f"{QUANTIZE} D --least-gain 1", ["--least-gain"]),
    (f"{QUANTIZE} D --scheme int3", ["'int3'"]),
    (f"{QUANTIZE} D --precision decoder", ["--precision 'decoder'"]),
    (f"{QUANTIZE} D --precision a=int8 --precision a=float", ["--precision", "a twice"]),
    (f"{QUANTIZE} D --keep-float head", ["'head'"]),
    (f"{QUANTIZE} T/nowhere", ["T/nowhere"]),
    (f"{QUANTIZE} D --sensitivity T/layers.svg", ["hint: name a file that does: T/layers.json"]),
    (f"{QUANTIZE} T/layers.json --sensitivity T/layers.json", ["layers.json"]),
    (f"{QUANTIZE} D --sensitivity B/golden.json", ["golden.json", "B"]),
    ("inspect T", ["no manifest.json"]),
    ("bench T", ["no manifest.json"]),
    ("bench preset:x", ["perceiver-export export preset:x -o"]),
    ("bench B --csv D", [".csv"]),
    ("bench B --csv B/a.csv", ["a.csv", "B"]),
    ("bench B --csv T/none/figures.csv", ["figures.csv"]),
    ("bench B --device ort-cpu --precision bf16", ["precision"]),
    ("demo T", ["T"]),
    ("demo T/demo", ["demo.json", "`shows`"]),
    ("package B --for torchserve", ["'torchserve'"]),
    (f"{BUILD} abacus", ["'abacus'"]),
    (f"{BUILD} openvno", ["hint: did you mean openvino-gpu or openvino-npu or openvino-cpu? give one of"]),
    (f"{BUILD} openvino-npu", ["NPU"]),
    (f"{BUILD} ort-cpu --precision fp16", ["precision"]),
    (f"{BUILD} openvino-cpu --precision fp8", ["'fp8'"]),
    (f"{BUILD} tensorrtfoo --lower-only", ["'tensorrtfoo'"]),
    (f"{BUILD} ort-cpu --lower-only", ["ort-cpu", "--lower-only"]),
    (f"{BUILD} tensorrt --lower-only --precision int8", ["'int8'"]),
    (f"{BUILD} tensorrt --lower-only --precision auto", ["--lower-only", "auto"]),
    (f"{BUILD} tensorrt --precision auto", ["build B --target tensorrt --precision fp16"]),
    (f"{BUILD} ort-cpu --shape batch=1:2", ["batch=1:2"]),
    (f"{BUILD} ort-cpu --flag threads", ["threads"]),
    (f"{BUILD} ort-cpu --flag threads=2", ["'threads'"]),
]


@pytest.fixture(scope="module")
def places(fashion_bundle: Path, thousand: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Made once for all commands: none of them may write there."""
    folder = tmp_path_factory.mktemp("refused") / "work"
    (folder / "empty").mkdir(parents=True)
    (folder / "text.png").write_text("no image")
    (folder / "layers.json").write_text("{}")
    (folder / "demo").mkdir()
    (folder / "demo" / "demo.json").write_text("{}")
    image, data = (str(shutil.copy(file, folder)) for file in (FASHION / "images" / "bag.png", thousand))
    bundle = str(shutil.copytree(fashion_bundle, folder.with_name("bundle")))
    return {"B": bundle, "C": str(FASHION / "checkpoint"), "D": data, "P": image, "T": str(folder)}


@pytest.mark.parametrize(("typed", "expected"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_refused_with_the_datum_and_nothing_is_written(typed: str, expected: list[str], places: dict[str, str]) -> None:
    def named(words: str) -> str:
        return re.sub(r"(?<!\S)[BCDPT](?=/|\s|$)", lambda found: places[found[0]], words)

    folder = Path(places["T"]).parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    said = fail(*named(typed).split(" "))

    assert all(named(datum) in said for datum in expected), said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


USAGE = ["export", "dance", "run --loud", "bench x --runs many", "validate b --metric a --data d --metric=--metric"]


@pytest.mark.parametrize("typed", USAGE)
def test_usage_errors_exit_with_two(typed: str) -> None:
    done = perceiver_export(*typed.split())

    assert done.returncode == 2
    assert typed.split()[-1].rpartition("=")[2] in done.stderr
    assert [line.partition(":")[0] for line in unwrapped(done.stderr).splitlines()] == ["error", "hint"]


@pytest.mark.parametrize("ending", [".html", ".md"])
def test_a_report_without_its_library_is_refused_before_the_work(
    ending: str, fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    # The data is not there either, and is read first of all that takes time.
    said = fail("validate", fashion_bundle, "--data", tmp_path / "absent.npz", "--report", tmp_path / f"report{ending}")

    assert "jinja2" in said
    assert install_command("report") in said


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    said = fail("export", "x", "-o", "y")

    assert "torch" in said
    assert install_command("export") in said


def test_answers_may_lie_beside_the_images(fashion_bundle: Path, tmp_path: Path) -> None:
    shutil.copy(FASHION / "images" / "bag.png", tmp_path)
    for _ in range(2):  # its own answers may be replaced
        succeed("run", fashion_bundle, tmp_path, "-o", tmp_path / "answers.json")


def test_links_and_directories_are_seen_through(tmp_path: Path) -> None:
    sample = tmp_path / "samples" / "0.npz"
    sample.parent.mkdir()
    np.savez(sample)
    (tmp_path / "link.npz").symlink_to(sample)

    for path, read in ((tmp_path / "link.npz", sample), (sample, tmp_path / "link.npz"), (sample, sample.parent)):
        with pytest.raises(UsageError):
            check_output(path, [read])
    check_output(sample.with_name("new.npz"), [sample.parent, "module:function", "text\0", None])
