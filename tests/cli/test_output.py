# SPDX-License-Identifier: Apache-2.0
"""What commands print: tables that are too wide, sizes, stages that cost nothing."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest

from perceiver_export.calibration import Gates
from perceiver_export.calibration.validation.gates import check_against_fp32
from perceiver_export.calibration.validation.metrics import families, metrics_of, share_of_right
from perceiver_export.exporter.cli.output import mebibytes, print_table, quiet, say
from perceiver_export.runtimes import presence
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.engines import openvino
from perceiver_export.runtimes.presence import precision_advice
from tests.calibration import manifests


def test_names_are_folded_between_their_parts_and_figures_never(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    rows = [
        ("encoder.self_attentions.0.mlp", "298.75 k", "42.00 MFLOP"),
        ("/a/folder/of/pictures.png", "1 k", "0 FLOP"),
    ]
    print_table("title", ["", "weights>", "bytes read and written>"], rows)
    lines = capsys.readouterr().out.splitlines()
    rule = next(number for number, line in enumerate(lines) if "──" in line)
    first, *_, last = cells = [re.split(" {2,}", line) for line in lines[rule + 1 :]]

    assert max(map(len, lines)) <= 50
    assert [first[1:], last[1:]] == [["298.75 k", "42.00 MFLOP"], ["1 k", "0 FLOP"]]
    assert [name for name, *_ in cells] == ["encoder.self_attentions.0.", "mlp", "/a/folder/of/pictures.png"]
    monkeypatch.setenv("COLUMNS", "2")  # no terminal is so narrow
    print_table("title", ["[red]"], [("a",)])
    assert "[red]" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "30")  # too few for the figures of a row: it is a paragraph
    print_table("title", ["", "weights>", "bytes read and written>"], rows)
    said = " ".join(capsys.readouterr().out.split())
    print_table("title", ["", "f" * 26 + ">"], [("is", "1")])  # a short name and the undrawn > need no room
    assert "──" in capsys.readouterr().out
    assert all(f"{name}; weights {weights}; bytes read and written {moved}" in said for name, weights, moved in rows)


def test_a_command_goes_on_after_a_backslash_and_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["perceiver-export", "validate", "D" * 40, "--data", "a b " * 10, "--against", "E" * 40]
    for text, mark in ((shlex.join(words), "next:"), (f"build it: {shlex.join(words)}", "")):
        say(text, mark)
        *_, copied = capsys.readouterr().out.partition("perceiver-export")

        assert " \\\n" in copied
        assert shlex.split("perceiver-export" + copied.replace("\\\n", "")) == words  # as a shell reads it


def test_the_command_that_is_advised_certifies_with_a_gate_that_fits_and_the_threads_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = {"fp32": (1.0, 1.0, 1.0), "fp16": (0.5, 0.6, 0.7)}
    monkeypatch.setattr(presence, "relative_times", lambda path, target, threads: times if threads == 2 else {})
    monkeypatch.setattr(presence, "choose_precision", lambda bundle, target, threads: "fp32")
    texts, values, several = manifests.texts, manifests.judged("regression"), manifests.judged("multi-label")
    for one in (texts, values, several, manifests.language, manifests.flow, manifests.video, manifests.sets):
        advice = precision_advice(Bundle(Path("bundle"), one), "openvino-cpu", 2)
        *command, option, _, certifies = advice.partition(": ")[2].split()

        assert (command[-4:], certifies) == (["--data", "DATA", "--against", "bundle"], "--certify")
        assert "--threads 2" in advice
        gate: dict[str, Any] = {option[2:].replace("-", "_"): 1.0}
        check_against_fp32(Gates(**gate), one)
        assert (option == "--max-drop") == (share_of_right(metrics_of(families(one))) is not None)
    quantized = Bundle(Path("bundle"), msgspec.structs.replace(texts, precision="int8"))
    assert "--against FP32_BUNDLE" in precision_advice(quantized, "openvino-cpu", 2)


@pytest.mark.parametrize(
    ("features", "advised"),
    [
        (("avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"), "bf16"),
        (("avx512_fp16",), "fp16"),
        (("asimd", "asimdhp"), "fp16"),
        (("avx512_bf16",), "bf16"),
    ],
)
def test_the_precision_to_measure_is_the_one_that_the_cpu_has_the_fastest_instructions_for(
    features: tuple[str, ...], advised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "cpu_features", lambda: features)
    monkeypatch.setattr(openvino, "precisions", lambda target: ("fp16", "bf16"))
    bundle = Bundle(Path("bundle"), manifests.texts)

    assert precision_advice(bundle, "openvino-cpu").startswith(f"{advised} may be faster")
    assert precision_advice(bundle, "openvino-gpu").startswith("fp16 may be faster")


def test_quiet_leaves_verdicts_and_warnings_of_a_command_that_writes(capsys: pytest.CaptureFixture[str]) -> None:
    kept, left_out = ("PASS, with reservations:", "NO GATE:", "warning:"), ("", "PASS", "  rung 1:", "certificate")
    with quiet(True, True):
        for mark in (*kept, *left_out):
            say("text", mark)

    assert capsys.readouterr().out.splitlines() == [f"{mark} text" for mark in kept]


def test_small_sizes_are_not_rounded_to_nothing() -> None:
    assert [mebibytes(size) for size in (0, 1536, 2**20, 5e9)] == ["0.0 MiB", "1.5 KiB", "1.0 MiB", "4,768.4 MiB"]
