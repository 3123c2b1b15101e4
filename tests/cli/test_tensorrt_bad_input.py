# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with TensorRT on a device, as its user sees it: the GPU is made up, TensorRT for RTX is real."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from perceiver_export.calibration.lowering.tensorrt import lower_bundle
from perceiver_export.runtimes import build
from perceiver_export.runtimes.engines import tensorrt
from perceiver_export.runtimes.engines.cuda import Gpu
from perceiver_export.runtimes.errors import install_command
from tests.calibration.damaged_scales import rehashed
from tests.calibration.onnx_text import write
from tests.cli.commands import fail, succeed
from tests.conftest import FASHION
from tests.runtimes.built_engines import edit_record, left_behind

SM86 = ("--target", "tensorrt-rtx", "--flag", "compute_capability=sm86")
PICTURE = FASHION / "images" / "coat.png"


A4000 = Gpu("NVIDIA RTX A4000 (sm_86)", (8, 6), 1 << 34)


@pytest.fixture
def driver_tells(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gpu], None]:
    """``driver_tells(gpu)``: from here on the machine's driver tells of this GPU."""
    return lambda gpu: monkeypatch.setattr(tensorrt, "cuda_gpus", lambda: (gpu,))


@pytest.fixture(scope="module")
def engine(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine in fp16 for SM86."""
    bundle = Path(shutil.copytree(fashion_bundle, tmp_path_factory.mktemp("built") / "bundle"))
    lower_bundle(bundle, "fp16")
    build(bundle, "tensorrt-rtx", precision="fp16", flags={"compute_capability": "sm86"})
    return bundle


@pytest.fixture
def built(engine: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(engine, tmp_path / "bundle"))


def of_another_version(record: dict[str, Any]) -> None:
    record["identity"]["platform"]["version"] = "1.6.0.5"


def cut(engine: Path) -> None:
    content = (engine / "model.engine").read_bytes()
    (engine / "model.engine").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("gpu", "spoil", "message"),
    [
        (
            A4000,
            lambda engine: edit_record(engine, of_another_version),
            "it was built with tensorrt-rtx 1.6.0.5, but this is",
        ),
        (
            Gpu("RTX 5090 (sm_120)", (12, 0), 1 << 34),
            lambda engine: None,
            "it was built for sm86, but this is RTX 5090 (sm_120)",
        ),
        (A4000, cut, "is damaged: model.engine has"),
    ],
    ids=["version", "device", "half"],
)
def test_an_engine_that_is_not_for_here_is_refused_with_the_command_that_makes_one(
    gpu: Gpu, spoil: Callable[[Path], None], message: str, built: Path, driver_tells: Callable[[Gpu], None]
) -> None:
    (record,) = built.glob("engines/tensorrt-rtx/*/engine.json")
    spoil(record.parent)
    driver_tells(gpu)

    verbs: tuple[list[str | Path], ...] = (
        ["run", built, PICTURE],
        ["bench", built],
        ["validate", built, "--data", FASHION / "test.npz"],
    )
    for verb in verbs:
        said = fail(*verb, "--device", "tensorrt-rtx")
        assert message in said
        assert f"build {built} --target tensorrt-rtx --precision fp16" in said


def test_a_gpu_that_tensorrt_for_rtx_is_not_for_is_sent_to_tensorrt(
    copied_bundle: Path, driver_tells: Callable[[Gpu], None]
) -> None:
    driver_tells(Gpu("Orin (sm_87)", (8, 7), 1 << 34))
    said = fail("build", copied_bundle, "--target", "tensorrt-rtx")

    assert "TensorRT for RTX 1.7 supports sm75, sm80, sm86, sm89, sm120, sm121, but not Orin (sm_87)" in said
    assert "--target tensorrt\n" in said


@pytest.mark.parametrize(
    ("library", "package"),
    [("libnvonnxparser.so.10", "libnvonnxparsers10"), ("libnvinfer_plugin.so.8", "libnvinfer-plugin8")],
)
def test_tensorrt_without_one_of_its_libraries_says_which_package_has_it(
    library: str,
    package: str,
    copied_bundle: Path,
    tmp_path: Path,
    driver_tells: Callable[[Gpu], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its Python module is linked with all of them, the parser's too: without one its import fails in these words."""
    (tmp_path / "tensorrt.py").write_text(f"raise ImportError('{library}: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    driver_tells(A4000)
    said = fail("build", copied_bundle, "--target", "tensorrt")

    assert f"needs tensorrt: {library}" in said
    assert f"sudo apt install {package};" in said


def test_an_operator_that_the_version_lacks_is_named_and_nothing_is_left(copied_bundle: Path) -> None:
    body = (
        "(float[1,3,28,28] image) => (float[1,10] logits) { d = Det(image)  r = Reshape(d, s)  logits = MatMul(r, w) }"
    )
    model = write(copied_bundle / "model.onnx", body, s=np.array([1, 3], np.int64), w=np.ones((3, 10), np.float32))
    onnx.checker.check_model(str(model))
    said = fail("build", rehashed(copied_bundle), *SM86)

    assert "cannot read model.onnx: Det " in said
    assert f"perceiver-export lint {copied_bundle} --target tensorrt-rtx --version 1.7" in said
    assert left_behind(copied_bundle) == []


# As on a device: nothing that rewrites or trains models can be imported, nor {more}.
ON_A_DEVICE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "{more}"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from perceiver_export.exporter.cli.main import main
main()
"""


def without(more: str = "") -> list[str]:
    return [sys.executable, "-W", "error", "-c", ON_A_DEVICE.format(more=more)]


def test_commands_of_a_device_need_neither_torch_nor_onnx_and_others_say_what_they_need(
    copied_bundle: Path, thousand: Path
) -> None:
    data, here = ("--data", thousand), ("--device", "ort-cpu")
    lower_bundle(copied_bundle, "fp16")
    succeed("doctor", command=without("onnxruntime"))
    succeed("build", copied_bundle, *SM86, "--precision", "fp16", command=without("onnxruntime"))
    succeed("bench", copied_bundle, *here, "--runs", "5", command=without())
    succeed("validate", copied_bundle, *data, "--samples", "3", *here, command=without())

    for arguments in (("build", copied_bundle, "--target", "tensorrt", "--lower-only"), ("lint", copied_bundle)):
        assert install_command("quantize") in fail(*arguments, command=without())
    said = fail("quantize", copied_bundle, *data, "-o", copied_bundle.parent / "int8", command=without())
    assert "quantize needs onnx_ir, which is not installed" in said


@pytest.mark.parametrize("workspace", ["1KiB", "0", "99999999999999GiB"])
def test_a_workspace_that_cannot_be_leaves_nothing(workspace: str, copied_bundle: Path) -> None:
    assert "--flag workspace=" in fail("build", copied_bundle, *SM86, "--flag", f"workspace={workspace}")
    assert left_behind(copied_bundle) == []
