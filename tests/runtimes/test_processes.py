# SPDX-License-Identifier: Apache-2.0
"""Processes that fork, that end with work in flight, or that have nothing in their home directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.fuzz.exits import CASES, problem
from tests.runtimes.targets import EXPECTED

FORKING = """
import multiprocessing, sys, tempfile, threading, warnings
from pathlib import Path
import numpy as np
from perceiver_export.runtimes import Batcher, load
from perceiver_export.runtimes.errors import RuntimeClosedError
from perceiver_export.runtimes.files import locked
from perceiver_export.runtimes.tasks.base import Task

warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: forking beside threads, which is what is tested
bundle, target = sys.argv[1:]
feeds = {"image": np.ones((1, 3, 28, 28), np.float32)}

def refused(call):
    try:
        call(feeds)
    except RuntimeClosedError:
        return True
    return False

def child(pipe):
    global runtime, batcher
    answers = [refused(call) for call in (runtime.run, runtime.submit, batcher.submit, lambda _: task.part(None))]
    batcher.close()
    task.close()
    runtime.close()
    del batcher, runtime
    with load(bundle, target) as own:
        answers.append(bool(np.array_equal(own.run(feeds)["logits"], expected)))
        answers.append(bool(np.array_equal(own.submit(feeds).result()["logits"], expected)))
    pipe.send(answers)

def slow_part(name):
    loading.set()
    done.wait()

runtime = load(bundle, target)
batcher = Batcher(runtime)
expected = runtime.run(feeds)["logits"]
runtime.submit(feeds).result()
batcher.run(feeds)
loading, done, place = threading.Event(), threading.Event(), Path(tempfile.mkdtemp())
task = Task(None, slow_part)  # its lock is held while the child is forked, and so is the runtime's and that of a file
threading.Thread(target=task.part, args=(None,), daemon=True).start()
loading.wait()
runtime._lock.acquire()
here, there = multiprocessing.Pipe()
process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
with locked(place):
    process.start()
runtime._lock.release()
done.set()
with locked(place, wait=False):  # although the child still lives
    pass
print(here.recv() if here.poll(60) else "no answer")
process.join(30)
print(process.exitcode, np.array_equal(runtime.submit(feeds).result()["logits"], expected))
batcher.close()
runtime.close()
"""
RUNNING = """
import sys
import numpy as np
from perceiver_export.runtimes import load
with load(*sys.argv[1:]) as runtime:
    runtime.run({"image": np.ones((1, 3, 28, 28), np.float32)})
print("openvino_telemetry" in sys.modules)
"""


@pytest.mark.parametrize("target", EXPECTED)
def test_a_forked_child_is_refused_loads_its_own_and_ends(fashion_bundle: Path, target: str) -> None:
    """It may not use its parent's runtime, and neither side hangs."""
    command = [sys.executable, "-c", FORKING, str(fashion_bundle), target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.stdout.splitlines() == ["[True, True, True, True, True, True]", "0 True"], done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=list(CASES))
def test_a_program_may_end_in_the_middle_of_anything(number: int, case: str, fashion_bundle: Path) -> None:
    """Exit code 0, and not a word; tests/fuzz/exits.py does it many times."""
    assert problem(case, fashion_bundle, EXPECTED[number % len(EXPECTED)]) == ""


@pytest.mark.parametrize("target", EXPECTED)
def test_a_run_leaves_the_stamps_of_this_package_only(fashion_bundle: Path, tmp_path: Path, target: str) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [sys.executable, "-c", RUNNING, str(fashion_bundle), target]
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
