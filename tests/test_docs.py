# SPDX-License-Identifier: Apache-2.0
"""Every command and every Python block of the README and of docs/ runs, and the site builds without a dead link.

A comment before a block says where it needs hardware or a user's files; such a block is not run.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer

from perceiver_export.exporter.cli.main import app
from tests.benchmarks.harness import END
from tests.calibration.asked import pictures
from tests.cli.commands import succeed
from tests.conftest import FASHION, SmallBundle

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^(<!-- needs .* -->\n)?```(sh|bash|python)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
FIGURE = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?:e-?\d+)?|(?<![\w.])\d{1,3},\d{3}")
# Lines that install, that CI itself is, and one that takes long: the test of planned samples runs it.
PLAN = "validate --plan --max-drop 0.6 --flips 1%"
ELSEWHERE = ("make ", "pip ", f"perceiver-export {PLAN}")
OWN = (REPOSITORY / "examples" / "your_own.py").read_text(encoding="utf-8")
# Names that a page's blocks use and its reader has.
IMAGE = np.zeros((1, 3, 28, 28), np.float32)
ARRAYS: dict[str, dict[str, Any]] = {
    "embed": {"image": IMAGE, "frames": [{"image": IMAGE}] * 3},
    "split": {"frames": np.zeros((1, 2, 3, 16, 24), np.float32), "wanted": np.arange(9)},
}


def markdown() -> list[Path]:
    return sorted((REPOSITORY / "docs").rglob("*.md"))


def pages() -> dict[str, list[tuple[str, str]]]:
    """Language and text of the blocks of each page, without those of an earlier page and those of examples."""
    found, seen = {}, {OWN}
    # The demos of the gallery take minutes: test_trained_examples has what they show.
    for page in (REPOSITORY / "README.md", *(one for one in markdown() if one.stem != "gallery")):
        blocks = [(kind, text) for needs, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if not needs]
        found[page.stem] = [block for block in blocks if not any(block[1] in other for other in seen)]
        seen |= {text for _, text in blocks}
    return {name: blocks for name, blocks in found.items() if blocks}


PAGES = pages()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory like a checkout's root; of the 10,000 test images it has what decides the gates."""
    fashion = tmp_path / "examples" / "fashion_mnist"
    fashion.mkdir(parents=True)
    pictures(fashion / "test.npz", slice(1500))
    for file in (*FASHION.iterdir(), *FASHION.parent.iterdir()):
        link = tmp_path / "examples" / file.relative_to(FASHION.parent)
        if not link.exists():
            link.symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return tmp_path


@pytest.fixture
def prepare(place: Path, request: pytest.FixtureRequest, small_bundle: SmallBundle) -> Callable[[str], None]:
    """Puts there what a block reads and no block before it wrote."""
    made: dict[str, Callable[[], Path]] = {
        "fashion": lambda: request.getfixturevalue("fashion_bundle"),
        "fashion-int8": lambda: request.getfixturevalue("int8_bundle"),
        "fashion-batched": lambda: request.getfixturevalue("batched_bundle"),
        "flow": lambda: small_bundle("flow", True),
    }

    def prepare(text: str) -> None:
        written = re.findall(r"-o (\S+)", text)
        for name, make in made.items():
            if re.search(rf"[\s\"']{name}[\s\"']", text) and name not in written and not (place / name).exists():
                shutil.copytree(make(), place / name)
        if "model.onnx" in text:
            tokens_model(place / "model.onnx")
        if "my_code" in text:
            (place / "my_code.py").write_text(POLICY, encoding="utf-8")

    return prepare


@pytest.mark.usefixtures("untimed", "one_process")
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_runs(page: str, prepare: Callable[[str], None]) -> None:
    names = dict(ARRAYS.get(page, {}))
    for kind, text in PAGES[page]:
        prepare(text)
        if kind == "python":
            exec(compile(text, page, "exec"), names)
        else:
            run_lines(text)


def run_lines(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        command, *arguments = shlex.split(line, comments=True)
        if command == "cd":
            os.chdir(arguments[0])
        elif not line.startswith(ELSEWHERE):
            assert command == "perceiver-export", line
            succeed(*arguments)


def test_a_command_in_a_sentence_has_the_options_that_it_names() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {
        name: {one for p in found.params for one in (*p.opts, *p.secondary_opts)} for name, found in commands.items()
    }
    seen = 0
    for page in (*markdown(), *REPOSITORY.glob("*.md"), *REPOSITORY.glob("examples/*/README.md")):
        for span in re.findall(r"`(?:perceiver-export )?([a-z][^`<>]*)`", page.read_text(encoding="utf-8")):
            name, *words = span.split()[:40]
            given = {re.sub(r"[=/].*", "", word) for word in words if re.match("--[a-z]", word)}
            if name in known and given:
                seen += 1
                assert given <= known[name] | {"--help"}, (page, span)
    assert seen > 40


def test_the_verdict_in_the_texts_is_the_measured_one() -> None:
    results, readme, guide = (
        " ".join((REPOSITORY / name).read_text(encoding="utf-8").split())
        for name in ("docs/results/int8.md", "README.md", "docs/guides/validate.md")
    )
    row = r"\| ort-cpu \| \S+ \| \S+ \| (\d+) \| (\d+) \| \S+ \| (\S+) \| held"
    lost, gained, bound = re.findall(row, results)[0]
    most = math.ceil(1000 * float(bound)) / 1000

    assert f"answered {gained} more and {lost} fewer of 10,000" in readme
    assert f"the loss is at most {most} points (0.6 allowed)" in readme
    assert f"On {gained} of them only the int8 model was right, on {lost} only" in guide
    assert f"So {most} points is the bound" in guide


def test_the_planned_samples_are_those_of_the_command() -> None:
    fleets, guide = (
        (REPOSITORY / "docs" / "guides" / f"{name}.md").read_text("utf-8") for name in ("fleets", "validate")
    )
    assert f"\nperceiver-export {PLAN}\n" in fleets
    plans = re.findall(r"(--max-drop \S+) +(\S+) +(\S+) +(\S+)", succeed(*PLAN.split()))
    rows = [f"| `{option}` | {' | '.join(samples)} |" for option, *samples in plans]
    _, few, more, most = plans[1]

    assert (len(rows), "\n".join(rows) in fleets) == (3, True)
    said = " ".join(guide.split())
    assert f"{few} samples pass 80 times in 100, {more} samples 90 times, {most} samples 95 times" in said


def test_every_command_is_in_a_block_that_these_tests_see() -> None:
    for page in markdown():
        if page.parent.name != "results":  # whose commands take hours
            text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            assert not re.search(r"^(    |~~~)", text, flags=re.MULTILINE), page


def tokens_model(path: Path) -> None:
    """An ONNX file with open dimensions, and inputs for it."""
    weights = onnx.numpy_helper.from_array(np.ones((64, 8), np.float32), "weights")
    product = onnx.helper.make_node("MatMul", ["tokens", "weights"], ["rows"])
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("tokens", [512, 64]), ("rows", [512, 8]))
    ]
    graph = onnx.helper.make_graph([product], "tokens", ends[:1], ends[1:], [weights])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)
    np.savez(path.with_name("inputs.npz"), tokens=np.ones((512, 64), np.float32))


# The README's function, with a module and weights that it can load.
POLICY = """
import torch


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.see, self.feel = torch.nn.Linear(3, 4), torch.nn.Linear(14, 4)

    def forward(self, image, state):
        return self.see(image.mean((2, 3))) + self.feel(state)


torch.save(Policy().state_dict(), "policy.pt")
""" + next(text for kind, text in PAGES["README"] if "def policy" in text).replace("Policy(...)", "Policy()")


def test_the_site_builds_without_a_dead_link(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "llms.txt").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[.*\]\((.*)\): .", index, flags=re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(REPOSITORY / "docs")) for page in markdown())
    assert all((tmp_path / "site" / page).is_file() for page in listed)
    for link in re.findall(r"\]\(((?!http)[^)#]+)", (REPOSITORY / "README.md").read_text(encoding="utf-8")):
        assert (REPOSITORY / link).exists(), link


def test_the_pages_of_the_reference_are_what_make_reference_writes() -> None:
    pages = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["pages"]()

    assert len(pages) == 11
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name} is out of date: make reference"


def test_the_page_of_errors_has_the_exit_codes() -> None:
    page = (REPOSITORY / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")

    assert re.findall(r"^\| (\d) \| .+ \|$", page, flags=re.MULTILINE) == ["0", "1", "2"]


def test_sections_of_results_are_marked_with_commands_that_exist() -> None:
    for page in (REPOSITORY / "docs" / "results").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        commands = re.findall(r"^<!-- python -m tests\.benchmarks\.(\w+)( .*)? -->$", text, flags=re.MULTILINE)
        assert text.count(f"\n{END}") == len(commands), page
        for name, options in commands:
            module = importlib.import_module(f"tests.benchmarks.{name}")
            known = inspect.signature(module.measure).parameters
            given = {option.removeprefix("no-") for option in re.findall(r"--([\w-]+)", options)}
            assert given <= {parameter.replace("_", "-") for parameter in known}, (page, name, options)


def test_the_readme_has_the_largest_difference_of_an_output() -> None:
    page = (REPOSITORY / "docs" / "results" / "parity.md").read_text(encoding="utf-8")
    section = page[page.index("## DeepMind") : page.index("## Exported graphs")]
    rows = re.findall(r"^\| \w+ \| ([\w/]+) \| (\S+) \| \S+ \|$", section, flags=re.MULTILINE)
    largest = max(float(number) for name, number in rows)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")

    assert len(rows) > 10
    assert f"| {largest:.1e} | [parity]" in readme


def test_the_readmes_figures_are_on_the_pages_that_it_names() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("## Results") : readme.index("## Documentation")]
    rows = re.findall(r"^\| (.*) \| .*\]\((docs/results/.*)\) \|$", table, flags=re.MULTILINE)
    assert rows
    for row, page in rows:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        numbers = [float(number.replace(",", "")) for number in NUMBER.findall(text)]
        for figure in FIGURE.findall(row):
            digits = len(figure.partition("e")[0].partition(".")[2])
            form = f".{digits}e" if "e" in figure else f",.{digits}f"
            assert any(format(number, form) == figure for number in numbers), (figure, page)
