# SPDX-License-Identifier: Apache-2.0
"""The package as it is shipped, and the README as it is read."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import get_args

import pytest

from perceiver_export.exporter import PRESETS
from perceiver_export.exporter.checkpoints import huggingface_config
from perceiver_export.exporter.checkpoints.haiku import HaikuModel
from perceiver_export.exporter.cli.run import RUNNERS
from perceiver_export.runtimes.engines.backend import TARGETS
from perceiver_export.runtimes.tasks import TASKS

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("exporter", "runtimes", "calibration")
PUBLIC = (*FOLDERS, "exporter.model")


def python_files() -> list[str]:
    return sorted(
        str(path.relative_to(REPOSITORY)) for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")
    )


def test_the_wheel_holds_the_tree_under_one_namespace(tmp_path: Path) -> None:
    shutil.rmtree(REPOSITORY / "build" / "lib", ignore_errors=True)  # setuptools keeps modules that are gone
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(REPOSITORY)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packaged = sorted(name for name in names if name.endswith(".py"))

    top = [f"perceiver_export/{path.name}" for path in (REPOSITORY / "package").glob("*.py")]
    assert packaged == sorted([*top, *(f"perceiver_export/{name}" for name in python_files())])
    assert {f"perceiver_export/{folder}/py.typed" for folder in FOLDERS} <= set(names)
    assert "perceiver_export/exporter/presets.json" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"perceiver_export"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    code = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    templates = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "calibration").rglob("*.j2")}
    others = {"exporter/presets.json", "pyproject.toml", "README.md", "LICENSE"}
    assert {*python_files(), *templates, *others} <= names


@pytest.mark.parametrize("folder", PUBLIC)
def test_what_is_promised_is_there(folder: str) -> None:
    module = importlib.import_module(f"perceiver_export.{folder}")

    assert sorted(module.__all__) == sorted(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_folders_import_only_what_they_may() -> None:
    """runtimes: nothing of ours; calibration: runtimes; exporter: both."""
    allowed = {"runtimes": {"runtimes"}, "calibration": {"runtimes", "calibration"}, "exporter": set(FOLDERS)}
    for name in python_files():
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        imported = set(re.findall(r"(?:from|import) perceiver_export\.(\w+)", text))
        assert imported <= allowed[name.split("/")[0]], name
        if not name.startswith("exporter"):
            assert not re.search(r"^\s*(?:import|from) torch", text, flags=re.MULTILINE), name


def test_files_stay_readable() -> None:
    for name in python_files():
        lines = (REPOSITORY / name).read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{name} has {lines} lines"


def imports() -> dict[str, set[str]]:
    """Of every module, the modules that it imports as it is imported itself."""
    files = {
        f"perceiver_export.{name[:-3].replace('/', '.').removesuffix('.__init__')}": name for name in python_files()
    }
    found: dict[str, set[str]] = {name: set() for name in files}
    for module, file in files.items():
        for node in ast.parse((REPOSITORY / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module in files:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
                found[module] |= submodules or {str(node.module)}
    return found


def test_no_imports_form_a_circle() -> None:
    order = list(graphlib.TopologicalSorter(imports()).static_order())  # raises CycleError
    assert len(order) >= len(python_files())


def test_parts_of_calibration_import_one_way() -> None:
    def part(module: str) -> str:
        return ".".join(module.split(".")[1:3])

    pairs = {(part(module), part(other)) for module, others in imports().items() for other in others}
    inside = {pair for pair in pairs if pair[0] != pair[1] and all(name.startswith("calibration.") for name in pair)}
    assert len(inside) <= 20
    assert not [pair for pair in inside if pair[::-1] in inside]


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the page's table whose first row begins so."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    lines = text[text.index(heading) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_table_of_tasks_names_the_same() -> None:
    named = [name for row in table("README.md", "| task | call |") for name in re.findall(r"`([\w-]+)`", row[0])]
    assert named == list(TASKS) == list(RUNNERS)
    assert {preset.task for preset in PRESETS.values()} | set(huggingface_config.TASKS.values()) <= TASKS.keys()


def test_every_table_of_targets_names_the_same() -> None:
    for page in ("README.md", "docs/reference/targets.md"):
        named = [name for row in table(page, "| target |") for name in re.findall(r"`([\w-]+)`", row[0])]
        assert sorted(named) == sorted([*TARGETS, "ort-NAME"]), page


def test_the_pages_systems_and_checkpoints_are_those_of_the_code() -> None:
    presets = [row[0].strip("`") for row in table("docs/results/parity.md", "| preset | paper |")]
    assert presets == list(PRESETS)
    checkpoints = {row[0]: row[1] for row in table("docs/guides/checkpoints.md", "| SOURCE of `export` | what it is |")}
    released = re.findall(r"`([a-z-]+)`", checkpoints["`deepmind:TASK:FILE`"].split(";")[1].split(".")[0])
    assert tuple(released) == get_args(HaikuModel)
    (directory,) = (text for source, text in checkpoints.items() if source == "`path/to/directory`")
    endings = re.findall(r"`(?:PerceiverFor|…)(\w+)`", directory)
    assert len(endings) == len(huggingface_config.TASKS)
    for ending in endings:
        assert sum(name.endswith(ending) for name in huggingface_config.TASKS) == 1, ending
