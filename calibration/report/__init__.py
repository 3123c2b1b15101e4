# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file with everything in it, that opens without a network; or Markdown for a pull request."""

from __future__ import annotations

from pathlib import Path

from perceiver_export.calibration.report.content import Report
from perceiver_export.calibration.report.plots import drop_plot, latency_plot, sensitivity_plot
from perceiver_export.runtimes.errors import MissingDependencyError, UsageError

__all__ = ["Report", "check_report_file", "render_html", "render_markdown", "write_report"]

_ENDINGS = (".html", ".md")


def check_report_file(path: Path) -> None:
    """Before a model runs for minutes: refuse an ending that is not a report's. Raises UsageError."""
    if path.suffix not in _ENDINGS:
        raise UsageError(f"a report cannot be written as {path.suffix or path.name}", "name it .html or .md")


def write_report(path: Path, report: Report) -> None:
    """Write to ``path``, HTML or Markdown by its ending. Raises UsageError, MissingDependencyError, OSError."""
    check_report_file(path)
    text = render_html(report) if path.suffix == ".html" else render_markdown(report)
    path.write_text(text, encoding="utf-8")


def render_html(report: Report) -> str:
    """One HTML document: pictures and plots inline, light and dark by the reader's setting, no script."""
    plots = {
        "drop": drop_plot(report.validations),
        "latency": latency_plot(report.speeds),
        "sensitivity": sensitivity_plot(report.sensitivity),
    }
    return _render("report.html", report, plots)


def render_markdown(report: Report) -> str:
    """The same in short, for a pull request; without pictures, which such pages do not take inline."""
    return _render("report.md", report, {})


def _render(name: str, report: Report, plots: dict[str, str]) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("a report needs jinja2", "pip install 'perceiver-export[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(f"{name}.j2").render(report=report, plots=plots)
