# SPDX-License-Identifier: Apache-2.0
"""The report in headless Chromium: nothing is complained of, nothing fetched, nothing wider than the window.

Needs a `chromium` on the path, and is skipped without; with PERCEIVER_EXPECT_CHROMIUM=1 its absence is a failure.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from perceiver_export.calibration.report.report import gather, write_report
from tests.calibration.asked import judged

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "hide-scrollbars")
READABLE = ("--dump-dom", "--allow-file-access-from-files", "--enable-logging=stderr")
# The report in a frame as wide as a window; the page's text becomes what a script finds in it.
PROBE = """<!DOCTYPE html>
<body><iframe src="report.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe><script>
onload = () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const all = selector => [...page.querySelectorAll(selector)];
  const style = element => frame.contentWindow.getComputedStyle(element);
  const outside = bar => bar.offsetLeft < -8 || bar.offsetLeft + bar.offsetWidth > bar.parentElement.clientWidth + 8;
  document.body.textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    cut: all(".wide").filter(box => box.scrollWidth > box.clientWidth).map(box => box.innerText),
    outside: all(".track i").filter(outside).length,
    bars: all(".track").length,
    images: [...page.images].map(image => image.complete && image.naturalWidth),
    verdict: page.querySelector(".verdict strong").innerText,
    colours: [style(page.body).backgroundColor, style(page.body).color, style(all(".track i")[0]).backgroundColor],
    smallest: Math.min(...all("td, p, pre").map(element => parseFloat(style(element).fontSize))),
  });
};
</script></body>"""


@pytest.fixture(scope="module")
def report(
    int8_bundle: Path,
    fashion_bundle: Path,
    thousand: Path,
    tmp_path_factory: pytest.TempPathFactory,
    one_process_in_module: None,
) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    result = judged(int8_bundle, thousand, against=fashion_bundle, samples=150, max_drop=0.5, min_agreement=90)
    command = f"perceiver-export validate {'long ' * 60}"
    write_report(path, gather(int8_bundle, [result], fashion_bundle, command, data=thousand))
    return path


def test_a_browser_is_there_where_it_must_be() -> None:
    expected = os.environ.get("PERCEIVER_EXPECT_CHROMIUM") == "1"
    assert CHROMIUM is not None or not expected, "CI opens the report in a browser, and has none"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: the report was not opened in a browser")
@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_opens_and_fits(report: Path, width: int, dark: bool, tmp_path: Path) -> None:
    probe = report.with_name("probe.html")
    probe.write_text(PROBE.replace("WIDTH", str(width)))
    options = [f"--user-data-dir={tmp_path}", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    command = [str(CHROMIUM), *(f"--{name}" for name in OPTIONS), *READABLE, *options, probe.as_uri()]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    body = re.search(r"<body[^>]*>(.*)</body>", done.stdout, re.DOTALL)
    assert body is not None
    found = json.loads(html.unescape(body[1]))

    assert "CONSOLE" not in done.stderr  # nor was anything fetched: the report's own policy would complain
    assert (found["width"], found["cut"], found["outside"]) == (width, [], 0)
    assert found["bars"] > 10
    assert found["images"] == [28] * 12
    assert found["verdict"] == "NOT ENOUGH DATA: this is not a pass"
    background, text, drawn = found["colours"]
    assert contrast(background, text) > 12
    assert contrast(background, drawn) > 3  # bars take the page's colours
    assert (brightness(background) > 0.5) == (not dark)
    assert found["smallest"] >= 12


def brightness(colour: str) -> float:
    """Relative luminance of an rgb() colour, by WCAG."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG's ratio, 1 to 21."""
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)
