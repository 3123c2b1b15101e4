# SPDX-License-Identifier: Apache-2.0
"""Code lines (without blanks, comments and docstrings) and modules of the product; a test lets neither rise.

`python -m tests.frozen.size` lowers the record. To raise it, edit the file, and give the reason in the commit.
"""

from __future__ import annotations

import ast
import io
import json
import tokenize
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).parent / "size.json"
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def measured() -> dict[str, int]:
    """Code lines and modules of exporter, runtimes and calibration, and code lines of tests."""
    product = [path for name in ("exporter", "runtimes", "calibration") for path in (REPOSITORY / name).rglob("*.py")]
    tests = list((REPOSITORY / "tests").rglob("*.py"))
    return {
        "code lines": sum(map(code_lines, product)),
        "modules": len(product),
        "code lines of tests": sum(map(code_lines, tests)),
    }


def code_lines(path: Path) -> int:
    """Lines that hold code."""
    source = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(lines)


if __name__ == "__main__":
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    lowered = {what: min(count, recorded[what]) for what, count in measured().items()}
    RECORD.write_text(json.dumps(lowered, indent=1) + "\n", encoding="utf-8")
