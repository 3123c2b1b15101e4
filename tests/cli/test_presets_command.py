# SPDX-License-Identifier: Apache-2.0
"""`presets` as it is read, and presets that cannot be exported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from perceiver_export.exporter.cli import presets as command
from perceiver_export.exporter.cli.main import app
from perceiver_export.exporter.load import load_model
from perceiver_export.exporter.presets import PRESETS
from perceiver_export.runtimes.errors import UsageError


def listed(*options: str) -> str:
    result = CliRunner().invoke(app, ["presets", *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_line_a_preset_and_its_deviation() -> None:
    lines = listed().splitlines()

    rows = {line.split()[1]: " ".join(line.replace("│", " ").split()) for line in lines if line.startswith("│")}
    assert set(PRESETS) <= set(rows)
    assert rows["imagenet-learned"] == (
        "imagenet-learned image-classification image 3×224×224 512×1024 62.26 M 62.3 M -0.1% 478 G 407 G +17.5%"
    )
    assert rows["video-autoencoding"].endswith("audio 30720×1 784×512 19.86 M 20 M -0.7% 7.472 T 6.85 T +9.1%")
    assert rows["modelnet40"].endswith("points 2048×3 512×1024 44.77 M 101.8 G")
    assert max(map(len, lines)) <= 160
    text = " ".join(" ".join(lines).split())
    for name, preset in PRESETS.items():
        assert not preset.remark or f"{name}: {preset.remark}" in text
    assert "unlike those of language-bytes. One query: 230.9 GFLOP." in text


def test_narrow_terminals_break_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_columns", lambda: 80)
    table = [line for line in listed().splitlines() if line[:1] in "┏┃┡│└"]

    assert max(map(len, table)) <= 80
    words = " ".join(table).replace("│", " ").split()
    for name, preset in PRESETS.items():
        assert name in words
        assert preset.task in words
    assert "16×224×224×3" in words
    assert "+91.2%" in words


def test_json() -> None:
    document = json.loads(listed("--json"))

    assert list(document) == list(PRESETS)
    assert document["perceiver-imagenet"]["parameters"] == 44_912_254
    assert document["perceiver-imagenet"]["paper"] == {
        "reference": "Perceiver, table 6",
        "parameters": 44.9e6,
        "flops": 707.2e9,
    }
    assert document["language-bytes"]["flops_of_one_query"] == 111_002_919_936
    assert document["modelnet40"]["architecture"]["encoder"]["num_cross_attentions"] == 2


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from perceiver_export.exporter.cli.presets import presets\n"
        "presets(json=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "modelnet40" in done.stdout


@pytest.mark.parametrize(
    ("source", "shape", "parity", "message", "hint"),
    [
        ("imagenet-furier", None, None, "no preset 'imagenet-furier'", "did you mean imagenet-fourier?"),
        ("", None, None, "no preset ''", "presets: language-bytes, "),
        ("optical-flow", (3, 64, 64), None, "optical-flow reads no pictures", "leave --shape out"),
        ("imagenet-conv", (1, 64, 64), None, "reads 3 channels, not 1", "3xHxW"),
        ("imagenet-conv", (3, 4, 64), "huggingface", "4 × 64 pictures are too small", "5 or more"),
    ],
)
def test_what_cannot_be_built_is_a_usage_error(
    source: str, shape: tuple[int, int, int] | None, parity: str | None, message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(f"preset:{source}", shape={"image": shape} if shape else None, parity=parity)

    assert message in caught.value.message
    assert hint in caught.value.hint
