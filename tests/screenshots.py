# SPDX-License-Identifier: Apache-2.0
"""The pictures of the report in docs/images/, made anew by the README's commands and headless Chromium.

`make screenshots`, on a machine that does nothing else: the report shows times.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.calibration.test_report_in_browser import CHROMIUM, OPTIONS
from tests.cli.commands import succeed

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES = REPOSITORY / "docs" / "images"
DATA = "examples/fashion_mnist"
COMMANDS = (
    f"export {DATA}/checkpoint -o fashion",
    f"quantize fashion --data {DATA}/held_out.npz -o fashion-int8",
    f"validate fashion-int8 --data {DATA}/test.npz --against fashion --max-drop 0.6 --min-agreement 97 --certify "
    "--report report.html",
)
# Width, height, and whether the reader's setting is light.
PICTURES = {
    "report": (1280, 1000, True),
    "report-dark": (1280, 1000, False),
    "report-narrow": (390, 1000, True),
    "report-narrow-dark": (390, 1000, False),
}


def make_report(folder: Path) -> Path:
    """Run the commands in ``folder``, so that the report names no path of this machine."""
    os.chdir(folder)
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    for command in COMMANDS:
        print(succeed(*command.split()))
    return folder / "report.html"


def take(report: Path, name: str, picture: Path) -> None:
    """One picture, in few colours: a page has few."""
    width, height, light = PICTURES[name]
    how = (f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={int(light)}")
    # Chromium's window is never narrower than 500 pixels: a page in a frame is.
    frame = report.with_name("frame.html")
    style = f"border: 0; position: fixed; left: 0; top: 0; width: {width}px; height: {height}px"
    frame.write_text(f'<!DOCTYPE html><iframe src="{report.name}" style="{style}"></iframe>', encoding="utf-8")
    command = [str(CHROMIUM), *(f"--{option}" for option in OPTIONS), *how, f"--screenshot={picture}", frame.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    Image.open(picture).convert("RGB").crop((0, 0, width, height)).quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    if CHROMIUM is None:
        sys.exit("no chromium on the path")
    with tempfile.TemporaryDirectory() as temporary:
        page = make_report(Path(temporary))
        for name in PICTURES:
            take(page, name, IMAGES / f"{name}.png")
