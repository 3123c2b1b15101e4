# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in a home directory in which nothing was: this package's own cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.runtimes.targets import EXPECTED

SCRIPT = """
import sys
import numpy as np
from perceiver_export.runtimes import load
with load(*sys.argv[1:]) as runtime:
    runtime.run({"image": np.ones((1, 3, 28, 28), np.float32)})
print("openvino_telemetry" in sys.modules)
"""


@pytest.mark.parametrize("target", EXPECTED)
def test_a_run_leaves_the_stamps_of_this_package_only(fashion_bundle: Path, tmp_path: Path, target: str) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, str(fashion_bundle), target]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)

    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.parent.as_posix() for path in left] == [".cache/perceiver-export/verified"]
    assert done.stdout == "False\n"


def test_openvino_is_imported_nowhere_else() -> None:
    for folder in ("runtimes", "calibration", "exporter"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            imports = text.count("import openvino\n") + text.count('require("openvino"')
            assert imports == text.count("with without_openvinos():\n"), path
