# SPDX-License-Identifier: Apache-2.0
"""docs/guides/checkpoints.md says what the tables in the code say. Run as a module, this file writes its tables anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perceiver_export.exporter.checkpoints.huggingface_config import IGNORED, TASKS, HuggingFaceConfig, uses
from perceiver_export.exporter.checkpoints.image_processors import FLAGS, PROCESSORS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "checkpoints.md"


def rows(header: tuple[str, ...], cells: Sequence[tuple[str, ...]]) -> str:
    lines = (header, ("---",) * len(header), *cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fields_of_config() -> str:
    def classes(by: tuple[str, ...]) -> str:
        names = (name.removeprefix("PerceiverFor").replace("ImageClassification", "") for name in by)
        return "all" if len(by) == len(TASKS) else ", ".join(names)

    defaults = HuggingFaceConfig()
    values = dict(zip(uses(), (getattr(defaults, name) for name in defaults.__struct_fields__), strict=True))
    cells = [
        (f"`{name}`", "" if values[name] in (None, "") else f"`{values[name]}`", classes(use.by), use.text)
        for name, use in uses().items()
    ]
    return rows(("field", "default", "read by", "what becomes of it"), cells)


# What stands in the page between `<!-- NAME -->` and `<!-- end -->`.
TABLES = {
    "config.json": fields_of_config(),
    "classes": ", ".join(f"`{name}`" for name in PROCESSORS) + ".\n",
    "preprocessor_config.json": rows(
        ("flag", "what becomes of it"), [(f"`{name}`", what) for name, what in FLAGS.items()]
    ),
    "ignored": rows(("field", "why"), [(f"`{name.replace(', ', '`, `')}`", why) for name, why in IGNORED.items()]),
}


def with_tables(page: str) -> str:
    for name, table in TABLES.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        page = before + mark + table + rest[rest.index("<!-- end -->") :]
    return page


def test_the_page_has_the_tables_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")

    assert page == with_tables(page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
