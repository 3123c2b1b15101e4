# SPDX-License-Identifier: Apache-2.0
"""The report in headless Chromium: nothing is complained of, nothing fetched, nothing wider than the window.

Needs a `chromium` on the path, and is skipped without; with PERCEIVER_EXPECT_CHROMIUM=1 its absence is a failure.
REPORT_SCREENSHOTS names a folder for pictures of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perceiver_export.calibration import validate
from perceiver_export.calibration.report import write_report
from perceiver_export.calibration.report.gather import gather
from tests.calibration.browser import find_chromium, open_page

TEST = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist" / "test.npz"
CHROMIUM = find_chromium()
# Whether some of a text lies outside of its plot.
CUT = """cut = text => {
    const [inner, outer] = [text, text.closest('svg')].map(element => element.getBoundingClientRect());
    return inner.left < outer.left || inner.right > outer.right || inner.bottom > outer.bottom;
}"""


@pytest.fixture(scope="module")
def report(int8_bundle: Path, fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    result = validate(int8_bundle, TEST, against=fashion_bundle, samples=150, max_drop=0.5, min_agreement=90)
    write_report(path, gather(int8_bundle, [result], fashion_bundle, [f"perceiver-export validate {'long ' * 60}"]))
    return path


def test_a_browser_is_there_where_it_must_be() -> None:
    expected = os.environ.get("PERCEIVER_EXPECT_CHROMIUM") == "1"
    assert CHROMIUM is not None or not expected, "CI opens the report in a browser, and has none"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: the report was not opened in a browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_opens_and_fits(report: Path, width: int, scheme: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    with open_page(CHROMIUM, tmp_path / "profile") as page:
        page.open(report, width, scheme)

        assert page.complaints() == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        boxes = "[...document.querySelectorAll('.wide, figure')].filter(e => e.scrollWidth > e.clientWidth)"
        assert page.evaluate(f"{boxes}.map(e => e.innerText)") == []  # nothing is cut off beside the window
        texts = "[...document.querySelectorAll('figure svg text')].filter(text => cut(text))"
        assert page.evaluate(f"{CUT}; {texts}.map(text => text.textContent)") == []
        assert page.evaluate("document.images.length") == 12
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth === 28)")
        assert page.evaluate("document.querySelector('.verdict strong').innerText") == "Undecided: this is not a pass"
        light, text = (
            page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
        )
        assert contrast(light, text) > 12
        assert (brightness(light) > 0.5) == (scheme == "light")
        drawn = "getComputedStyle(document.querySelector('figure svg text')).fill"
        assert contrast(light, page.evaluate(drawn)) > 12  # plots take the page's colours
        sizes = "[...document.querySelectorAll('td, p, pre')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        assert min(page.evaluate(sizes)) >= 12
        shots = os.environ.get("REPORT_SCREENSHOTS")
        if shots:
            page.screenshot(Path(shots) / f"report-{width}-{scheme}.png")


def brightness(colour: str) -> float:
    """Relative luminance of an rgb() colour, by WCAG."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG's ratio, 1 to 21."""
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)
