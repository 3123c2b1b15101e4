# SPDX-License-Identifier: Apache-2.0
"""The package as it is shipped, and the README as it is read."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("exporter", "runtimes", "calibration")


def python_files() -> list[str]:
    return sorted(
        str(path.relative_to(REPOSITORY)) for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")
    )


def test_the_wheel_holds_the_tree_under_one_namespace(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(REPOSITORY)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packaged = sorted(name for name in names if name.endswith(".py"))

    assert packaged == [f"perceiver_export/{name}" for name in python_files()]
    assert {f"perceiver_export/{folder}/py.typed" for folder in FOLDERS} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"perceiver_export"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_promised_is_there(folder: str) -> None:
    module = importlib.import_module(f"perceiver_export.{folder}")

    assert sorted(module.__all__) == sorted(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_the_readmes_map_names_every_file() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"^\| `([\w/.]+\.py)` \|", readme, flags=re.MULTILINE))
    tracked = {name for name in python_files() if not name.endswith("__init__.py")}
    examples = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "examples").rglob("*.py")}
    benchmarks = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tests" / "benchmarks").glob("*.py")}

    assert mapped == tracked | examples | benchmarks


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
        assert lines <= 330, f"{name} has {lines} lines"
