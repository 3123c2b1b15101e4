# SPDX-License-Identifier: Apache-2.0
"""Kill commands that write, with SIGKILL, and see that what they write is whole or absent.

    python tests/fuzz/kills.py --kills 2000 --directory /dev/shm --directory /tmp

Each case runs one command (export, quantize, build, validate --certify; to a new place, or in place of what is there)
in a forked process that kills itself at the n-th operation on a file, or is killed after a random time. After each:
the bundle that was there opens with every hash right, a new one is whole or absent, the same command then works, and
nothing is left beside the bundle. Prints its counts; exits with 1 where something was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # tests.cli.small_models, however this is started

_OPERATIONS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate", "shutil.")
_COMMANDS = ("export", "quantize", "quantize", "build", "build", "build", "certify", "certify")  # as often as drawn
_OPERATION_COUNTS = {"export": 60, "quantize": 60, "build": 20, "certify": 60}  # about as many as each does
_MOST_SECONDS = 6.0
FASHION = ROOT / "examples" / "fashion_mnist"
_CALIBRATION = ("--data", str(FASHION / "held_out.npz"), "--samples", "16")


class Case:
    """One directory with a bundle, and a command that writes there."""

    def __init__(self, directory: Path, command: str, overwrite: bool) -> None:
        self.directory, self.command, self.overwrite = directory, command, overwrite
        self.bundle = directory / ("int8" if command == "certify" else "bundle")
        self.out = self.bundle if command in ("build", "certify") else directory / "out"
        place = ["-o", str(self.out), *(["--overwrite"] if overwrite else [])]
        self.arguments = {
            "export": ["export", "tests.cli.small_models:points", *place],
            "quantize": ["quantize", str(self.bundle), *_CALIBRATION, *place],
            "build": ["build", str(self.bundle), "--target", "ort-cpu", *(["--force"] if overwrite else [])],
            "certify": [
                *("validate", str(self.bundle), "--data", str(FASHION / "test.npz"), "--samples", "400"),
                *("--against", str(directory / "bundle"), "--min-agreement", "80", "--certify", "--device", "ort-cpu"),
            ],
        }[command]


def run(arguments: Sequence[str], kill_at: int | None = None, kill_after: float | None = None) -> tuple[bool, int]:
    """Run a command in a forked process; whether it was killed, and its exit code else."""
    child = os.fork()
    if child == 0:
        _child(arguments, kill_at)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.005)


def _child(arguments: Sequence[str], kill_at: int | None) -> None:
    from perceiver_export.exporter.cli.main import main

    sys.argv = ["perceiver-export", *arguments]
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    errors = os.open(os.environ["KILLS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    if kill_at is not None:
        left = kill_at

        def hook(event: str, details: tuple[object, ...]) -> None:
            nonlocal left
            writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event.startswith(_OPERATIONS):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    os._exit(code)


def check(case: Case, killed: bool) -> str:
    """What is wrong after a command that was killed, or that ended; nothing where all is as it should be."""
    from perceiver_export.runtimes import load, open_bundle
    from perceiver_export.runtimes.errors import PerceiverExportError

    there = {"bundle", *(("int8",) if case.command == "certify" else ()), *(("out",) if case.overwrite else ())}
    for name in sorted(there | {"out"}):
        place = case.directory / name
        if name not in there and not place.exists():
            continue
        try:
            open_bundle(place, verify="always")
        except PerceiverExportError as error:
            return f"{name} after the {'kill' if killed else 'command'}: {error.message}"
    if case.command == "build":
        try:
            load(case.bundle, "ort-cpu").close()
        except PerceiverExportError as error:
            return f"load after the {'kill' if killed else 'command'}: {error.message}"
    if not killed:
        # A `.new` is left where the kill came between two calls; it goes after a minute.
        left = [name for name in os.listdir(case.directory) if name not in there | {"out"} and ".new" not in name]
        left += [str(path) for path in case.bundle.rglob("*.partial*")]
        if left:
            return f"left behind: {', '.join(left)}"
    return ""


def one(template: Path, scratch: Path, generator: random.Random, commands: Sequence[str]) -> tuple[str, str]:
    """A random case: what it was, and what went wrong."""
    directory = Path(tempfile.mkdtemp(dir=scratch))
    case = Case(directory, generator.choice(commands), generator.random() < 0.5)
    try:
        for name in ("bundle", *(("int8",) if case.command == "certify" else ())):
            shutil.copytree(template / name, directory / name)
        if case.overwrite and case.command in ("export", "quantize"):
            shutil.copytree(template / "bundle", directory / "out")
        elif case.command in ("build", "certify"):
            case.overwrite = False
        if case.command == "build" and generator.random() < 0.5:
            run(case.arguments)
            case.arguments.append("--force")
        at = generator.randrange(_OPERATION_COUNTS[case.command]) if generator.random() < 0.7 else None
        after = None if at is not None else generator.uniform(0.0, _MOST_SECONDS)
        killed, _ = run(case.arguments, at, after)
        what = f"{case.command}{' over' if case.overwrite else ''}, {'killed' if killed else 'ended first'}"
        wrong = check(case, killed)
        if not wrong:
            if case.command in ("export", "quantize") and (directory / "out").exists() and not case.overwrite:
                case.arguments.append("--overwrite")
            again, code = run(case.arguments)
            wrong = f"the next command ended with {code}: {_log()}" if again or code else check(case, False)
        return what, wrong
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _log() -> str:
    return Path(os.environ["KILLS_LOG"]).read_text(encoding="utf-8", errors="replace").strip()[-300:]


def template(directory: Path, commands: Sequence[str], bundle: Path | None) -> None:
    """A bundle and, to certify, its int8 bundle, which every case copies."""
    made = [] if bundle else [["export", str(FASHION / "checkpoint"), "-o", str(directory / "bundle")]]
    if bundle:
        shutil.copytree(bundle, directory / "bundle")
    if "certify" in commands:
        made.append(["quantize", str(directory / "bundle"), *_CALIBRATION, "-o", str(directory / "int8")])
    for arguments in made:
        killed, code = run(arguments)
        if killed or code:
            sys.exit(f"{' '.join(arguments)} ended with {code}: {_log()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--only", default="", help="names of commands, separated by commas")
    parser.add_argument("--bundle", type=Path, help="the demo's bundle, which is exported otherwise")
    parser.add_argument("--directory", action="append", help="where to write; several file systems may be named")
    options = parser.parse_args()
    commands = [name for name in _COMMANDS if name in (options.only or name).split(",")]
    os.chdir(ROOT)
    _warm()
    generator, counts, losses = random.Random(options.seed), Counter[str](), 0
    end = time.monotonic() + 60 * options.minutes
    with contextlib.ExitStack() as stack:
        places = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory, prefix="kills-")))
            for directory in options.directory or [tempfile.gettempdir()]
        ]
        os.environ["KILLS_LOG"] = str(places[0] / "log")
        os.environ["XDG_CACHE_HOME"] = str(places[0] / "cache")
        os.environ["XDG_CONFIG_HOME"] = str(places[0] / "config")
        (places[0] / "template").mkdir()
        template(places[0] / "template", commands, options.bundle)
        for number in range(options.kills):
            if time.monotonic() > end:
                break
            what, wrong = one(places[0] / "template", places[number % len(places)], generator, commands)
            counts[what] += 1
            if wrong:
                losses += 1
                print(f"seed {options.seed}, case {number}: {what}: {wrong}", flush=True)
    for what, count in sorted(counts.items()):
        print(f"{count:6} {what}")
    killed = sum(count for what, count in counts.items() if what.endswith("killed"))
    print(f"{sum(counts.values())} cases, {killed} killed, {losses} lost")
    sys.exit(1 if losses else 0)


def _warm() -> None:
    """Import what every child needs, so that a fork starts at once. Nothing here may start a thread."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch

    import tests.cli.small_models  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
