# SPDX-License-Identifier: Apache-2.0
"""`presets` as it is read."""

from __future__ import annotations

import json
import re

from perceiver_export.exporter.presets import PRESETS
from tests.cli.commands import succeed


def test_every_preset_with_its_counts_the_papers_and_the_remark() -> None:
    lines = succeed("presets").splitlines()
    words, text = " ".join(lines).split(), " ".join(" ".join(lines).split())

    for name, preset in PRESETS.items():
        assert not preset.remark or f"{name}: {preset.remark}" in text
    assert {*PRESETS, *(preset.task for preset in PRESETS.values()), "16×224×224×3", "+91.2%"} <= {*words}
    first = next(line for line in lines if line.startswith("imagenet-learned"))
    assert re.split(" {2,}", first) == ["imagenet-learned", "image 3×224×224", "62.26 M", "478 G"]
    assert "One query: 230.9 GFLOP." in text


def test_json() -> None:
    document = json.loads(succeed("presets", "--json"))

    assert list(document) == list(PRESETS)
    assert document["perceiver-imagenet"]["parameters"] == 44_912_254
    assert document["perceiver-imagenet"]["paper"] == {
        "reference": "Perceiver, table 6",
        "parameters": 44.9e6,
        "flops": 707.2e9,
    }
    assert document["language-bytes"]["flops_of_one_query"] == 111_002_919_936
    assert document["modelnet40"]["architecture"]["encoder"]["num_cross_attentions"] == 2
