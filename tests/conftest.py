# SPDX-License-Identifier: Apache-2.0
"""Bundles that tests share. Nothing here imports torch: the runtime's tests also run where there is none."""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib.util
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FASHION = REPOSITORY / "examples" / "fashion_mnist"
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
SmallBundle = Callable[..., Path]

# Engines start a thread for each core: workers of pytest-xdist, one a core, would wait for one another's.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
if WORKER and hasattr(os, "sched_setaffinity"):
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER) % len(CORES)]})

# A shell that starts the suite in the background makes it ignore SIGINT, and commands under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """The garbage collector took a sixth of every export: modules stay, and graphs make many objects at once."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def one_registry() -> None:
    """Read torch's tables of operators once: it does so for each export, for over a quarter of a small one's time."""
    loaded = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(loaded, "ONNXRegistry", None)
    if registry is not None and not isinstance(vars(registry).get("from_torchlib"), staticmethod):
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))
    tables, name = sys.modules.get("torch._export.utils"), "_collect_all_valid_cia_ops_for_namespace"
    listed = getattr(tables, name, None)
    if listed is not None and not hasattr(listed, "cache_info"):
        setattr(tables, name, functools.cache(listed))


@pytest.fixture(autouse=True, scope="session")
def short_timing() -> Iterator[None]:
    """Timing loops of `quantize`, reports and profiles end after their fewest rounds; no test needs more."""
    if importlib.util.find_spec("onnx_ir") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perceiver_export.calibration.quantization.engines._LEAST", 0.0)
        patch.setattr("perceiver_export.calibration.report.profile._SECONDS", 0.1)
        peaks = "perceiver_export.calibration.report.peaks"
        for name, value in (("_SECONDS", 0.02), ("_SIZES", (64, 256)), ("_ELEMENTS", 1 << 20)):
            patch.setattr(f"{peaks}.{name}", value)
        yield


def _in_one_process() -> Iterator[None]:
    """`bench` without the processes that measure loading and memory, for tests that read neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perceiver_export.runtimes.benchmark._measure_fresh", lambda side: (1.0, 1.0, 1.0))
        yield


one_process = pytest.fixture(_in_one_process)
one_process_in_module = pytest.fixture(_in_one_process, scope="module")


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`quantize` without its comparison of speeds, for which each engine compiles four graphs."""
    from perceiver_export.calibration.quantization.record import Speed

    def alike(target: str, *_: object) -> Speed:
        return Speed(target, 1.0, 1.0, {}, ("fp32", "int8"), (1.0, 1.0, 1.0), "nothing was timed")

    monkeypatch.setattr("perceiver_export.calibration.quantization.engines.measure_speed", alike)


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders for `own_cache`: pytest would read all folders that there are to number the next one."""
    base = tmp_path_factory.mktemp("caches")
    return (base / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own user cache, so that none believes another's stamps."""
    cache = next(caches)
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture(autouse=True, scope="session")
def own_configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One key for the engines that tests build, which is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("configuration")))
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """``made_once(name, make)``: the folder ``name``, written by ``make(folder)`` for all tests of all workers."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if WORKER else base) / "made-once"
    root.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        place, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(place, ignore_errors=True)
                make(place)
                done.touch()
        return place

    return folder


@pytest.fixture(scope="session")
def plain_fashion_bundle(made_once: MadeOnce) -> Path:
    """The same without folds: every projection of the model is a layer of the graph. Read it, do not change it."""
    from perceiver_export.exporter import ExportOptions, export

    return made_once("plain", lambda path: export(FASHION / "checkpoint", path, ExportOptions(fold=False)))


@pytest.fixture(scope="session")
def fashion_bundle(made_once: MadeOnce) -> Path:
    """The demo's model as a bundle; read it, do not change it. PERCEIVER_TEST_BUNDLE names one made elsewhere."""
    made = os.environ.get("PERCEIVER_TEST_BUNDLE")
    if made:
        return Path(made)
    from perceiver_export.exporter import export

    return made_once("fashion", lambda path: export(FASHION / "checkpoint", path))


@pytest.fixture(scope="session")
def batched_bundle(made_once: MadeOnce) -> Path:
    """The demo's model for 1 to 16 samples a call; do not change it."""
    from perceiver_export.exporter import ExportOptions, export

    return made_once("Fashion v2", lambda path: export(FASHION / "checkpoint", path, ExportOptions(batch="1:4:16")))


@pytest.fixture(scope="session")
def int8_bundle(fashion_bundle: Path, made_once: MadeOnce) -> Path:
    """The demo's model in int8, calibrated on 32 images that were held out of training."""
    from perceiver_export.calibration import QuantizeOptions, quantize

    data, options = FASHION / "held_out.npz", QuantizeOptions(samples=32)
    return made_once("fashion-int8", lambda path: quantize(fashion_bundle, data, path, options))


@pytest.fixture(scope="session")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tenth of the demo's test images: to read all of them takes longer than to judge a few."""
    from tests.calibration.asked import pictures

    return pictures(tmp_path_factory.mktemp("images") / "test.npz", slice(0, 10_000, 10))


@pytest.fixture(scope="session")
def small_bundle(made_once: MadeOnce) -> SmallBundle:
    """``small_bundle(system, split=False)``: a model of `tests.cli.small_models` as a bundle; do not change it."""
    from perceiver_export.exporter import ExportOptions, export
    from tests.cli import small_models

    def bundle(system: str, split: bool = False) -> Path:
        name, options = f"{system}-{'split' if split else 'whole'}", ExportOptions(split=split)
        return made_once(name, lambda path: export(getattr(small_models, system)(), path, options))

    return bundle


@pytest.fixture
def copied_bundle(fashion_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo's bundle, to be damaged."""
    return Path(shutil.copytree(fashion_bundle, tmp_path / "bundle"))


@pytest.fixture
def copied_plain_bundle(plain_fashion_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo's bundle without folds."""
    return Path(shutil.copytree(plain_fashion_bundle, tmp_path / "bundle"))


@pytest.fixture
def edit_manifest(copied_bundle: Path) -> Callable[[str, str], Path]:
    """Replace text in the copy's manifest, and give the copy."""

    def edit(old: str, new: str) -> Path:
        manifest = copied_bundle / "manifest.json"
        text = manifest.read_text(encoding="utf-8")
        assert old in text
        manifest.write_text(text.replace(old, new), encoding="utf-8")
        return copied_bundle

    return edit
