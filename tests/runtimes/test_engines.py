# SPDX-License-Identifier: Apache-2.0
"""Built engines: found, refused before they are opened, rebuilt; builds that meet each other, are killed or find no
room, after which the cache is whole; and settings of libraries, of which none reaches them that is not listed.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes import build, load, open_bundle
from perceiver_export.runtimes.bundle import sha256
from perceiver_export.runtimes.engines import openvino, ort, tensorrt
from perceiver_export.runtimes.engines.flags import check_flags
from perceiver_export.runtimes.errors import BuildError, BundleError, EngineError, UsageError
from perceiver_export.runtimes.files import cache_directory
from tests.runtimes.built_engines import answered, compiled, edit_record, files_of_at_most, flip, left_behind, logits
from tests.runtimes.targets import EXPECTED

FILES = {"ort-cpu": "model.weights", "openvino-cpu": "model.blob"}


def test_an_engine_is_built_once_and_used_or_again_in_the_same_place(
    copied_bundle: Path, target: str, fashion_logits: Any
) -> None:
    built = [build(copied_bundle, target, force=force)[0] for force in (False, False, True)]
    where, found = answered(copied_bundle, target)

    assert [one.new for one in built] == [True, False, True]
    assert {one.directory for one in built} == {Path(where)}
    np.testing.assert_allclose(fashion_logits, found, atol=1e-5)
    assert left_behind(copied_bundle) == []


def test_an_engine_goes_along_with_a_copy_of_its_bundle(built_bundle: Path, target: str) -> None:
    """Which is what `built_bundle` is."""
    assert compiled(built_bundle, target).startswith(str(built_bundle))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda built: built["platform"].update(version="0.9"), "{library} 0.9, but this machine has {library} "),
        (lambda built: built["platform"].update(device="Abacus"), "for the device Abacus, but this machine has "),
        (lambda built: built["platform"].update(driver="12.6"), "the driver 12.6, but this machine has none"),
        (lambda built: built["platform"].update(features=["mmx"]), "the instruction sets mmx, but this machine has "),
        (lambda built: built.update(model="0" * 64), "it was built from another model"),
    ],
    ids=["version", "device", "driver", "features", "model"],
)
def test_a_stale_engine_is_told_before_it_is_opened_and_compiled_again(
    built_bundle: Path,
    target: str,
    fashion_logits: Any,
    edit: Callable[[dict[str, Any]], None],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    needs_engine: Callable[[], None],
) -> None:
    """20 ms are allowed to find it out; tests/benchmarks/loading.py measures it."""
    (built,) = build(built_bundle, target)
    edit_record(built.directory, lambda record: edit(record["identity"]))
    (built.directory / FILES[target]).unlink()
    os.mkfifo(built.directory / FILES[target])  # reading it would wait for ever
    library = {"ort-cpu": "onnxruntime", "openvino-cpu": "openvino"}[target]
    why = reason.format(library=library)

    with caplog.at_level(logging.WARNING):
        where, found = answered(built_bundle, target)
    assert where.startswith(f"at load, because the engine in {built.directory} cannot")
    assert why in caplog.text
    assert f"perceiver-export build {built_bundle} --target {target}" in caplog.text
    np.testing.assert_array_equal(fashion_logits, found)

    needs_engine()  # a target whose compiling takes minutes has nothing to fall back on
    with pytest.raises(EngineError, match=re.escape(why)) as caught:
        load(built_bundle, target)
    assert caught.value.hint == f"rebuild it: perceiver-export build {built_bundle} --target {target}"


def test_a_target_that_needs_an_engine_says_how_to_build_one(
    copied_bundle: Path, target: str, needs_engine: Callable[[], None]
) -> None:
    needs_engine()
    with pytest.raises(EngineError, match=r"no engine of .* was built") as caught:
        load(copied_bundle, target)
    assert f"perceiver-export build {copied_bundle} --target {target}" in caught.value.hint
    build(copied_bundle, target)
    assert logits(copied_bundle, target).shape == (1, 10)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "gone"])
def test_a_damaged_engine_is_refused_and_building_repairs_it(
    built_bundle: Path, target: str, damage: Callable[[Path], None]
) -> None:
    (built,) = build(built_bundle, target)
    damage(built.directory / FILES[target])

    with pytest.raises(EngineError, match="is damaged") as caught:
        load(built_bundle, target)
    with pytest.raises(EngineError, match="is damaged"):
        load(built_bundle, target, verify="never")
    assert "manifest" not in caught.value.message
    assert ("engine.json" in caught.value.message) == (damage is not Path.unlink)
    assert caught.value.hint == f"rebuild it: perceiver-export build {built_bundle} --target {target}"
    (again,) = build(built_bundle, target)
    assert (again.new, again.directory) == (True, built.directory)
    assert logits(built_bundle, target).shape == (1, 10)


def test_an_engine_that_is_not_what_its_record_says_is_refused_all_the_same(built_bundle: Path, target: str) -> None:
    (built,) = build(built_bundle, target)
    file = built.directory / {"ort-cpu": "model.onnx", "openvino-cpu": "model.blob"}[target]
    file.write_bytes(b"\x3a\x00")  # a whole ONNX file with an empty graph
    edit_record(
        built.directory, lambda record: record["files"][file.name].update(size=file.stat().st_size, sha256=sha256(file))
    )

    with pytest.raises(EngineError, match="cannot be opened") as caught:
        load(built_bundle, target)
    assert f"--target {target} --force" in caught.value.hint


@pytest.mark.parametrize(
    "content", [None, b"", b"not json", b"{}", b'{"schema_version": 99}', b"[1, 2]", b"\xff\xfe"], ids=repr
)
def test_a_record_that_cannot_be_read_is_told_and_is_no_engine(
    built_bundle: Path,
    target: str,
    content: bytes | None,
    caplog: pytest.LogCaptureFixture,
    needs_engine: Callable[[], None],
) -> None:
    (built,) = build(built_bundle, target)
    (built.directory / "engine.json").unlink()
    if content is not None:
        (built.directory / "engine.json").write_bytes(content)
    why = f"the engine in {built.directory} cannot be read: its engine.json is missing, damaged or from a newer version"

    with caplog.at_level(logging.WARNING):
        assert compiled(built_bundle, target) == f"at load, because {why}"
    assert f"{why}; compiled again at load. rebuild it: perceiver-export build {built_bundle}" in caplog.text
    needs_engine()
    with pytest.raises(EngineError, match=re.escape(why)):
        load(built_bundle, target)
    (again,) = build(built_bundle, target)
    assert (again.new, again.directory) == (True, built.directory)
    assert compiled(built_bundle, target) == str(built.directory)


def test_a_record_cannot_point_out_of_its_directory(built_bundle: Path, target: str) -> None:
    (built,) = build(built_bundle, target)
    edit_record(
        built.directory, lambda record: record["files"].update({"../../../manifest.json": {"sha256": "0", "size": 1}})
    )

    with pytest.raises(EngineError, match="is damaged"):
        load(built_bundle, target)


def test_a_quantized_bundle_without_a_graph_for_the_target_is_refused(
    edit_manifest: Callable[[str, str], Path],
) -> None:
    bundle = edit_manifest('"precision": "fp32"', '"precision": "int8"')

    for call in (load, build):
        with pytest.raises(BundleError, match="int8 but has no graph rewritten for ort-cpu"):
            call(bundle, "ort-cpu")
    if "openvino-cpu" in EXPECTED:
        assert logits(bundle, "openvino-cpu").shape == (1, 10)


def test_a_target_runs_the_graph_that_was_rewritten_for_it(
    copied_bundle: Path, edit_manifest: Callable[[str, str], Path]
) -> None:
    (copied_bundle / "model.ort-cpu.onnx").write_bytes(b"this is what ort-cpu has to open")
    entry = '"model.ort-cpu.onnx": {"sha256": "", "size": 32}, "model.onnx": {'
    edit_manifest('"lowered": {}', '"lowered": {"ort-cpu": "model.ort-cpu.onnx"}')
    edit_manifest('"model.onnx": {', entry)

    with pytest.raises(BundleError, match=r"model\.ort-cpu\.onnx cannot be loaded"):
        load(copied_bundle, "ort-cpu", verify="never")


def in_a_process(bundle: Path, target: str, progress: str) -> subprocess.Popen[str]:
    """Builds, and prints whether the engine is new."""
    call = f"build({str(bundle)!r}, {target!r}, progress=lambda *what: {progress})"
    code = f"import os, signal\nfrom perceiver_export.runtimes import build\nprint({call}[0].new)"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_processes_build_at_once_and_one_takes_what_the_other_made(copied_bundle: Path, target: str) -> None:
    others: list[subprocess.Popen[str]] = []

    def until_the_other_waits(what: str, done: int, total: int | None) -> None:
        if not others:
            others.append(in_a_process(copied_bundle, target, "print(what[0], flush=True)"))
            assert others[0].stdout is not None
            assert others[0].stdout.readline().startswith("waiting for the process that builds")

    assert build(copied_bundle, target, progress=until_the_other_waits)[0].new
    assert others[0].communicate(timeout=60)[0] == "False\n"
    assert others[0].returncode == 0
    assert left_behind(copied_bundle) == []
    assert logits(copied_bundle, target).shape == (1, 10)


def test_a_killed_build_leaves_nothing_that_the_next_one_minds(copied_bundle: Path, target: str) -> None:
    killed = in_a_process(copied_bundle, target, "os.kill(os.getpid(), signal.SIGKILL)")
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
    with files_of_at_most(1 << 20), pytest.raises(BuildError) as caught:
        build(copied_bundle, target)
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
NAMES_OF_FILES = {
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


@pytest.mark.parametrize(("target", "name"), [(target, name) for target in EXPECTED for name in NAMES_OF_FILES[target]])
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
