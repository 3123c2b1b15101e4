# SPDX-License-Identifier: Apache-2.0
"""The page of examples/web in headless Chromium: its labels are Python's. `make test-web` installs what it needs.

It is skipped without `chromium`, or without onnxruntime-web in examples/web/node_modules.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes import load, open_bundle, open_task
from perceiver_export.runtimes.bundle import golden_arrays
from perceiver_export.runtimes.tasks import ImageClassification
from tests.calibration.test_report_in_browser import CHROMIUM, OPTIONS
from tests.conftest import FASHION, REPOSITORY

WEB = REPOSITORY / "examples" / "web"
ENGINE = "node_modules/onnxruntime-web/dist"
PICTURES = ("bag.png", "coat.png", "sandal.png")
# Drops files on the page in a frame, one after another, and posts what the page then shows.
PROBE = """<!DOCTYPE html>
<iframe src="index.html?bundle=BUNDLE"></iframe><script type="module">
const page = document.querySelector("iframe");
const text = name => page.contentDocument.getElementById(name)?.innerText ?? "";
const until = async ready => { while (!ready()) await new Promise(done => setTimeout(done, 20)); };
await until(() => /^(Golden|error)/.test(text("check")));
const found = { check: text("check"), answers: {} };
for (const name of FILES) {
  const carried = new DataTransfer();
  carried.items.add(new File([await (await fetch(`dropped/${name}`)).blob()], name));
  const drop = page.contentDocument.getElementById("drop");
  drop.dispatchEvent(new page.contentWindow.DragEvent("drop", { dataTransfer: carried, cancelable: true }));
  await until(() => /^(error|.* ms )/.test(text("status")) && text("status").includes(name));
  found.answers[name] = [text("status"), text("answer")];
}
await fetch("found", { method: "POST", body: JSON.stringify(found) });
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what is posted."""

    def __init__(self, *arguments: Any, posted: queue.Queue[bytes], **options: Any) -> None:
        self.posted = posted
        super().__init__(*arguments, **options)

    def do_POST(self) -> None:
        self.posted.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path, fashion_bundle: Path, int8_bundle: Path) -> Path:
    """The page as its README deploys it, with two bundles."""
    place, dropped = tmp_path / "web", tmp_path / "web" / "dropped"
    dropped.mkdir(parents=True)
    (place / ENGINE).mkdir(parents=True)
    for name in ("index.html", f"{ENGINE}/ort.wasm.bundle.min.mjs", f"{ENGINE}/ort-wasm-simd-threaded.wasm"):
        (place / name).symlink_to(WEB / name)
    (place / "fp32").symlink_to(fashion_bundle)
    (place / "int8").symlink_to(int8_bundle)
    for name in PICTURES:
        shutil.copyfile(FASHION / "images" / name, dropped / name)
    (dropped / "broken.png").write_bytes(b"not an image")
    return place


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[str, queue.Queue[bytes]]]:
    posted: queue.Queue[bytes] = queue.Queue()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder), posted=posted)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", posted
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: the web example was not opened in a browser")
@pytest.mark.skipif(not (WEB / ENGINE).is_dir(), reason="no onnxruntime-web: run `make test-web`")
@pytest.mark.parametrize("bundle", ["fp32", "int8"])
def test_the_page_gives_pythons_labels(
    bundle: str, folder: Path, served: tuple[str, queue.Queue[bytes]], tmp_path: Path
) -> None:
    address, posted = served
    files = [*PICTURES, "broken.png"]
    (folder / "probe.html").write_text(PROBE.replace("BUNDLE", bundle).replace("FILES", json.dumps(files)))
    options = [*(f"--{name}" for name in OPTIONS), f"--user-data-dir={tmp_path / 'profile'}"]
    browser = subprocess.Popen(
        [str(CHROMIUM), *options, f"{address}/probe.html"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        found = json.loads(posted.get(timeout=60))
    finally:
        browser.terminate()
        browser.wait()

    told = re.match(
        r"Golden input: the browser says (.*), PyTorch says (.*); largest difference (\S+) ", found["check"]
    )
    assert told is not None, found["check"]
    opened = open_bundle(folder / bundle)
    with load(folder / bundle, "ort-cpu") as runtime:
        logits = runtime.run(golden_arrays(opened, "model", "input"))["logits"]
    assert told[1] == told[2] == opened.manifest.labels[int(np.argmax(logits))]
    assert bundle == "int8" or float(told[3]) < opened.manifest.verification[0].tolerance
    assert found["answers"].pop("broken.png") == ["error: broken.png is not an image that this browser can read", ""]
    with open_task(folder / bundle, ImageClassification, device="ort-cpu") as classify:
        for name, (_, shown) in found["answers"].items():
            wanted = classify(FASHION / "images" / name)
            lines = [line.rsplit(" ", 1) for line in shown.splitlines()]
            assert lines[0][0] == wanted[0].label, name
            # An int8 rounding that is nearly a tie falls either way: two engines' logits differ by 0.3 %.
            assert float(lines[0][1]) == pytest.approx(wanted[0].probability, abs=1e-3 if bundle == "fp32" else 0.01)
