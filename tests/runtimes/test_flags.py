# SPDX-License-Identifier: Apache-2.0
"""Settings of engines' libraries: those that are listed reach them, and no other, whoever gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from perceiver_export.runtimes import build
from perceiver_export.runtimes.engines import openvino, ort, tensorrt
from perceiver_export.runtimes.engines.flags import check_flags
from perceiver_export.runtimes.errors import UsageError
from tests.runtimes.built_engines import compiled, edit_record
from tests.runtimes.targets import EXPECTED

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


@pytest.mark.parametrize("target", EXPECTED)
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
