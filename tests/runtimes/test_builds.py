# SPDX-License-Identifier: Apache-2.0
"""Builds that meet each other, are killed or find no room: whatever happens, the cache stays whole. Settings of
libraries: those that are listed reach them, and no other.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perceiver_export.runtimes import build, load, open_bundle
from perceiver_export.runtimes.engines import openvino, ort, tensorrt
from perceiver_export.runtimes.engines.flags import check_flags
from perceiver_export.runtimes.errors import BuildError, UsageError
from perceiver_export.runtimes.files import cache_directory
from tests.runtimes.built_engines import compiled, edit_record, left_behind, logits
from tests.runtimes.targets import EXPECTED


def in_a_process(statement: str, **options: Any) -> subprocess.Popen[str]:
    code = f"import os, signal, sys, time\nfrom perceiver_export.runtimes import build\n{statement}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **options)


def test_two_processes_build_at_once_and_one_takes_what_the_other_made(copied_bundle: Path, target: str) -> None:
    slow = "lambda *what: (print(what[0]), time.sleep(0.3))"
    builds = [
        in_a_process(f"print(build({str(copied_bundle)!r}, {target!r}, progress={slow})[0].new)") for _ in range(2)
    ]
    answers = sorted(one.communicate(timeout=60)[0].splitlines() for one in builds)

    assert sorted(answer[-1] for answer in answers) == ["False", "True"]
    assert [one.returncode for one in builds] == [0, 0]
    assert left_behind(copied_bundle) == []
    assert logits(copied_bundle, target).shape == (1, 10)


def test_a_killed_build_leaves_nothing_that_the_next_one_minds(copied_bundle: Path, target: str) -> None:
    kill = "lambda *what: os.kill(os.getpid(), signal.SIGKILL)"
    killed = in_a_process(f"build({str(copied_bundle)!r}, {target!r}, progress={kill})")
    killed.communicate(timeout=60)

    assert killed.returncode == -signal.SIGKILL
    assert len(left_behind(copied_bundle)) == 1
    assert compiled(copied_bundle, target) == "at load"
    (built,) = build(copied_bundle, target)
    assert (built.new, left_behind(copied_bundle)) == (True, [])


def test_an_interrupted_build_cleans_up(copied_bundle: Path, target: str) -> None:
    def interrupt(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(copied_bundle, target, progress=interrupt)
    assert left_behind(copied_bundle) == []
    assert build(copied_bundle, target)[0].new


def test_a_full_disk_leaves_nothing_and_the_next_build_works(copied_bundle: Path, target: str) -> None:
    open_bundle(copied_bundle)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(BuildError) as caught:
            build(copied_bundle, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "space" in caught.value.hint
    assert left_behind(copied_bundle) == []
    assert build(copied_bundle, target)[0].new


def test_a_bundle_that_cannot_be_written_has_its_engines_in_the_users_cache(copied_bundle: Path, target: str) -> None:
    (copied_bundle / "engines").write_text("no directory can be made here", encoding="utf-8")
    (built,) = build(copied_bundle, target)

    assert built.directory.is_relative_to(cache_directory())
    assert compiled(copied_bundle, target) == str(built.directory)
    assert not build(copied_bundle, target)[0].new


def test_what_cannot_be_built_is_refused(copied_bundle: Path, target: str) -> None:
    with pytest.raises(UsageError, match="precision cannot be 'fp8'"):
        build(copied_bundle, target, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="hint cannot be 'speed'"):
        load(copied_bundle, target, hint="speed")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="throughput"):
        load(copied_bundle, target, hint="throughput", precision="auto")
    with pytest.raises(UsageError, match="no dimension 'batch'"):
        build(copied_bundle, target, shapes={"batch": (1, 2, 4)})
    assert not (copied_bundle / "engines").exists()


# A value for each that every machine takes.
SAMPLES = {
    "session.intra_op_thread_affinities": "",
    "optimization.disable_specified_optimizers": "ConstantSharing",
    "NUM_STREAMS": "1",
    "EXECUTION_MODE_HINT": "ACCURACY",
    "SCHEDULING_CORE_TYPE": "ANY_CORE",
    "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": "0.5",
}
FILES = {
    "ort-cpu": (
        "session.collect_node_memory_stats_to_file",
        "session.optimized_model_filepath",
        "ep.context_file_path",
    ),
    "openvino-cpu": ("CACHE_DIR", "WEIGHTS_PATH", "CONFIG_FILE"),
}


def test_what_is_listed_is_taken_by_the_library(copied_bundle: Path, target: str) -> None:
    module = ort if target == "ort-cpu" else openvino
    flags = {
        name: SAMPLES.get(name, "NO" if values.pattern == "YES|NO" else "0")
        for name, values in module.flags(target).items()
        if SAMPLES.get(name) != ""
    }
    build(copied_bundle, target, flags=flags)

    assert compiled(copied_bundle, target) == str(next(copied_bundle.glob(f"engines/{target}/[0-9a-f]*")))


@pytest.mark.parametrize(("target", "name"), [(target, name) for target in EXPECTED for name in FILES[target]])
def test_a_setting_that_names_a_file_never_reaches_the_library(
    built_bundle: Path, tmp_path: Path, target: str, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        build(built_bundle, target, flags={name: str(victim)})
    assert repr(name) in caught.value.message

    (built,) = build(built_bundle, target)
    edit_record(built.directory, lambda record: record["identity"]["options"]["flags"].update({name: str(victim)}))
    said = compiled(built_bundle, target)
    assert said.startswith("at load, because")
    assert repr(name) in said
    assert victim.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        ("ort-cpu", "session.dynamic_block_base", "-1"),
        ("ort-cpu", "session.set_denormal_as_zero", "true"),
        ("ort-cpu", "session.intra_op_thread_affinities", "/etc/passwd"),
        ("openvino-cpu", "NUM_STREAMS", "../1"),
        ("openvino-cpu", "ENABLE_CPU_PINNING", "YES\n"),
        ("openvino-gpu", "GPU_QUEUE_THROTTLE", "high"),
        ("tensorrt", "workspace", "much"),
        ("tensorrt", "optimization_level", "6"),
        ("tensorrt", "compute_capability", "sm86"),
        ("tensorrt", "speed", "high"),
        ("tensorrt-rtx", "compute_capability", "/etc/passwd"),
    ],
)
def test_a_value_of_another_type_is_refused(target: str, name: str, value: str) -> None:
    module = {"ort": ort, "openvino": openvino, "tensorrt": tensorrt}[target.partition("-")[0]]
    with pytest.raises(UsageError) as caught:
        check_flags(target, {name: value}, module.flags(target))
    assert name in caught.value.message
