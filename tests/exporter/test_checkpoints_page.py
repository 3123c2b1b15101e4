# SPDX-License-Identifier: Apache-2.0
"""docs/guides/checkpoints.md lists what the code reads: fields, their defaults, the classes that read them, flags."""

from __future__ import annotations

import re
from pathlib import Path

from perceiver_export.exporter.checkpoints.huggingface_config import ACTIVATIONS, TASKS, HuggingFaceConfig, read_by
from perceiver_export.exporter.checkpoints.preprocessor import NO_EFFECT, PROCESSORS, SWITCHES, Values

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "checkpoints.md"


def section(name: str) -> str:
    """What stands in the page between `<!-- NAME -->` and `<!-- end -->`."""
    return PAGE.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]


def cells(name: str) -> list[list[str]]:
    """The rows of a table of the page, without its header."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section(name).splitlines()[2:]]


def ignored_fields() -> set[str]:
    """Fields of config.json that the page says are ignored."""
    return {name for row in cells("ignored") for name in re.findall("`(.+?)`", row[0])}


def test_the_page_lists_each_field_with_its_default_and_its_classes() -> None:
    defaults = HuggingFaceConfig()
    values = dict(zip(read_by(), (getattr(defaults, name) for name in defaults.__struct_fields__), strict=True))

    def classes(by: tuple[str, ...]) -> str:
        names = (name.removeprefix("PerceiverFor").replace("ImageClassification", "") for name in by)
        return "all" if len(by) == len(TASKS) else ", ".join(names)

    expected = [
        [f"`{name}`", "" if values[name] in (None, "") else f"`{values[name]}`", classes(by)]
        for name, by in read_by().items()
    ]
    assert [row[:3] for row in cells("config.json")] == expected
    assert all(len(row) == 4 and row[3] for row in cells("config.json"))


def test_the_page_lists_each_activation() -> None:
    (row,) = (row for row in cells("config.json") if row[0] == "`hidden_act`")

    assert row[3].startswith(f"activation of every MLP: {', '.join(ACTIVATIONS)}. ")


def test_a_field_is_read_or_ignored() -> None:
    assert len(ignored_fields()) > 20
    assert not ignored_fields() & read_by().keys()


def test_the_page_lists_each_class_of_image_processors() -> None:
    assert " ".join(section("classes").split()) == ", ".join(f"`{name}`" for name in PROCESSORS) + "."


def test_the_page_lists_each_flag_of_image_processors() -> None:
    flags = {row[0].strip("`") for row in cells("preprocessor_config.json")}

    assert {*Values.__struct_fields__, *NO_EFFECT, "image_processor_type"} <= flags
    assert {flag for flag in flags if flag.startswith("do_")} <= SWITCHES | NO_EFFECT
