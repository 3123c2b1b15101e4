# SPDX-License-Identifier: Apache-2.0
"""What the site adds to the pages: the pictures of the gallery, which are in examples/, and llms.txt.

llms.txt lists the pages for language models, which read them as Markdown: the site has PAGE.md beside PAGE/.
"""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
_pages: dict[str, str] = {}  # the Markdown of each page, by its path


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for each page."""
    markdown = re.sub(r"!?\[([^]]*)\]\(\.\./(examples/[^)]+)\)", _inline, markdown)
    _pages[page.file.src_path] = markdown
    return markdown


def on_post_build(config: Any) -> None:
    """Called by MkDocs at the end: llms.txt, and each page as Markdown."""
    site = Path(config.site_dir)
    for path, markdown in _pages.items():
        (site / path).write_text(markdown, encoding="utf-8")
    (site / "llms.txt").write_text("\n".join(_index(config)), encoding="utf-8")


def _index(config: Any) -> Iterator[str]:
    """By llmstxt.org: the title, what it is, and the pages by section, each with its first sentence."""
    yield f"# {config.site_name}\n\n> {config.site_description}\n"
    for section in config.nav:
        ((title, entries),) = section.items()
        yield f"## {title}\n"
        for entry in entries if isinstance(entries, list) else [section]:
            ((name, path),) = entry.items()
            yield f"- [{name}]({path}): {_first_sentence(_pages[path])}"
        yield ""


def _first_sentence(markdown: str) -> str:
    """Of the first paragraph below the title."""
    text = next(text for text in markdown.split("\n\n")[1:] if re.match(r"\w|`\w", text))
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.split(r"(?<=\.) ", " ".join(text.split()))[0])


def _inline(link: re.Match[str]) -> str:
    """A picture or a sound of an example inside the page; of a link to another file its text."""
    kind = mimetypes.guess_type(link[2])[0] or ""
    if not kind.startswith(("image/", "audio/")):
        return link[1]
    data = f"data:{kind};base64,{base64.b64encode((REPOSITORY / link[2]).read_bytes()).decode()}"
    return f"![{link[1]}]({data})" if kind.startswith("image/") else f'<audio controls src="{data}"></audio>'
