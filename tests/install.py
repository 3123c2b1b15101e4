# SPDX-License-Identifier: Apache-2.0
"""The wheel and the sdist as a user installs them: each extra in a fresh environment, where what it is for then runs.

    python tests/install.py [--extras ort images …] [--bundle BUNDLE]

It needs a package index and takes minutes, so it is not part of `make test`. `tensorrt` is left out: it comes from
NVIDIA's own index. The wheel is built from the sdist, so that a file which the sdist lacks is missed here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE = REPOSITORY / "examples" / "fashion_mnist"
RUN = "perceiver-export run {bundle} {picture}"
LOAD = (
    "import numpy; from perceiver_export.runtimes import load;"
    " load({bundle!r}, 'TARGET').run({{'image': numpy.zeros((1, 3, 28, 28), numpy.float32)}})"
)
# What must work with one extra alone. `!NAME` before a command: it fails, and its hint installs the extra NAME.
CHECKS: dict[str, tuple[str, ...]] = {
    "": ("perceiver-export doctor", "perceiver-export inspect {bundle}", f"!images {RUN}"),
    "ort": (LOAD.replace("TARGET", "ort-cpu"), f"!images {RUN}"),
    "openvino": (LOAD.replace("TARGET", "openvino-cpu"),),
    "images": (f"!ort {RUN}",),
    "text": ("import tokenizers",),
    "hub": ("import huggingface_hub",),
    "validate": ("perceiver-export validate --plan --max-drop 1",),
    "report": ("from perceiver_export.calibration.report.report import write_report",),
    "quantize": (
        "perceiver-export quantize {bundle} --data {data} --samples 8 -o int8",
        "perceiver-export validate int8 --data {data} --samples 50",
    ),
    "export": ("perceiver-export export {checkpoint} -o exported", "perceiver-export inspect exported"),
    "all": ("perceiver-export export {checkpoint} -o exported", "perceiver-export run exported {picture}"),
    "tensorrt-rtx": ("import tensorrt_rtx",),
}


def main() -> None:
    """A line for each check; exit with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="*", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--bundle", type=Path, help="the demo's bundle; exported here by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, "-m", "build", "-o", str(folder), str(REPOSITORY)], check=True)
        (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
        bundle = arguments.bundle or exported(folder / "bundle")
        failed = [failure for extra in arguments.extras for failure in checked(wheel, extra, bundle, folder)]
        if "" in arguments.extras:
            failed += checked(sdist, "", bundle, folder)
    sys.exit("\n".join(failed) or 0)


def exported(bundle: Path) -> Path:
    from perceiver_export.exporter import export

    export(EXAMPLE / "checkpoint", bundle)
    return bundle


def checked(package: Path, extra: str, bundle: Path, folder: Path) -> list[str]:
    """Install the package with an extra into a new environment, and run the extra's checks there."""
    place = folder / f"{package.suffix}-{extra}"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    what, limits = f"{package}[{extra}]" if extra else str(package), str(REPOSITORY / "constraints.txt")
    subprocess.run([str(place / "bin" / "pip"), "install", "-q", "-c", limits, what], check=True)
    failed = [check for check in CHECKS[extra] if not holds(check, place, bundle, package)]
    took = time.perf_counter() - started
    print(f"{'FAILED' if failed else 'passed'} {package.name}[{extra}] in {took:.0f} s", flush=True)
    return failed


def holds(check: str, place: Path, bundle: Path, package: Path) -> bool:
    """Whether a command or a line of Python succeeds, or fails for want of an extra that the hint can install."""
    wanted, _, check = check[1:].partition(" ") if check.startswith("!") else ("", "", check)
    names = {"bundle": str(bundle), "picture": str(EXAMPLE / "images" / "bag.png")}
    text = check.format(**names, checkpoint=str(EXAMPLE / "checkpoint"), data=str(EXAMPLE / "held_out.npz"))
    command = text.split() if text.startswith("perceiver-export") else ["python", "-c", text]
    command[0] = str(place / "bin" / command[0])
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
    hint = f"pip install 'perceiver-export[{wanted}] @ {package.as_uri()}'"
    said = " ".join(done.stderr.replace("\\\n", " ").split())  # lines of a command are joined as a shell joins them
    held = done.returncode == 1 and hint in said if wanted else done.returncode == 0
    if not held:
        print(done.stderr[-2000:])
    return held


if __name__ == "__main__":
    main()
