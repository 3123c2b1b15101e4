# SPDX-License-Identifier: Apache-2.0
"""What an import brings into a process that has imported nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import perceiver_export.runtimes
from perceiver_export.runtimes import errors, load

HEAVY = {
    *("torch", "onnx", "onnx_ir", "onnxruntime", "openvino", "tensorrt"),
    *("typer", "rich", "PIL", "scipy", "safetensors"),
}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules after a statement, in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_runtime_brings_numpy_and_the_manifest_reader_only() -> None:
    loaded = loaded_by("import perceiver_export.runtimes.opening")  # all that `load` needs before an engine

    assert loaded & HEAVY == set()
    assert {"numpy", "msgspec"} <= loaded
    third_party = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert third_party - loaded_by("import numpy, msgspec") == {"perceiver_export"}
    assert loaded_by("from perceiver_export.runtimes import load") & {"numpy", "msgspec"} == set()


def test_running_brings_the_engine_and_still_no_torch(fashion_bundle: Path) -> None:
    loaded = loaded_by(
        "import numpy, perceiver_export.runtimes as r\n"
        f"t = r.open_task({str(fashion_bundle)!r})\n"
        "t(numpy.zeros((28, 28), numpy.uint8))"
    )

    assert loaded & HEAVY == {"onnxruntime"}


def test_everything_that_is_promised_is_there() -> None:
    assert perceiver_export.runtimes.__all__ == sorted(perceiver_export.runtimes.__all__)
    for name in perceiver_export.runtimes.__all__:
        assert getattr(perceiver_export.runtimes, name) is not None
    with pytest.raises(AttributeError):
        _ = perceiver_export.runtimes.no_such_thing


def test_every_error_can_be_imported_from_the_runtime() -> None:
    defined = {name for name in vars(errors) if name.endswith("Error")}

    assert defined <= set(perceiver_export.runtimes.__all__)
    assert defined >= {"PerceiverExportError", "InputError", "DeviceError", "GateError"}


def test_the_log_is_silent_unless_it_is_asked_for(fashion_bundle: Path) -> None:
    load = (
        "from perceiver_export.runtimes import DeviceError, load\n"
        f"load({str(fashion_bundle)!r})\n"
        f"try: load({str(fashion_bundle)!r}, 'ort-xnnpack')\n"
        "except DeviceError: pass\n"
    )

    def said(code: str) -> list[str]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == ""
        return done.stderr.splitlines()

    assert said(load + "import logging; logging.getLogger('perceiver_export').warning('one')") == []
    chosen, loaded, refused = said(f"import logging; logging.basicConfig(level='INFO')\n{load}")
    for line in (chosen, loaded, refused):
        assert line.startswith("INFO:perceiver_export.runtimes.")
        assert str(fashion_bundle) in line
    assert "ort-cpu" in chosen
    assert "'engine': 'onnxruntime'" in loaded
    assert "ort-xnnpack" in refused


def test_an_engine_that_is_not_installed_is_named_with_its_extra(
    fashion_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(errors.MissingDependencyError) as caught:
        load(fashion_bundle)

    assert caught.value.hint == errors.install_command("ort")


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'perceiver-export[text]'"),
        ({"url": "file:///a%20b/c", "dir_info": {}}, "pip install '/a b/c[text]'"),
        ({"url": "file:///a/c", "dir_info": {"editable": True}}, "pip install -e '/a/c[text]'"),
        (
            {"url": "https://wheels.example/p.whl", "archive_info": {}},
            "pip install 'perceiver-export[text] @ https://wheels.example/p.whl'",
        ),
        ({"url": "file:///it's", "dir_info": {}}, """pip install '/it'"'"'s[text]'"""),
        (
            {"url": "https://git.example/p", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'perceiver-export[text] @ git+https://git.example/p@abc'",
        ),
    ],
)
def test_a_hint_installs_an_extra_from_where_the_package_came(
    origin: dict[str, object] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "perceiver_export-1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Name: perceiver-export\nVersion: 1\n")
    if origin is not None:
        (record / "direct_url.json").write_text(json.dumps(origin))
    (tmp_path / "perceiver_export.egg-info").mkdir()  # of a checkout, which is found first
    (tmp_path / "perceiver_export.egg-info" / "PKG-INFO").write_text("Name: perceiver-export\nVersion: 1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    assert errors.install_command("text") == command
