# SPDX-License-Identifier: Apache-2.0
"""Certificates: written only on evidence, shown only where they hold, and gone with what they were about."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from perceiver_export.calibration import validate, write
from perceiver_export.calibration.certificate import certify
from perceiver_export.calibration.lowering.tensorrt_bundle import lower_bundle
from perceiver_export.calibration.record import read_calibration
from perceiver_export.calibration.report.content import Report
from perceiver_export.exporter import load_model, load_reference
from perceiver_export.exporter.inspection import inspect_bundle
from perceiver_export.runtimes import certificates, load, open_bundle
from perceiver_export.runtimes.engines.backend import EngineOptions, Platform, Precision
from perceiver_export.runtimes.engines.records import graphs_of, identify, make_source, mismatches
from perceiver_export.runtimes.engines.targets import find_target
from perceiver_export.runtimes.errors import DataError, ExportError, GateError, UndecidedError, UsageError
from perceiver_export.runtimes.machine import cpu_name

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
TEST = FASHION / "test.npz"
CPUS = ("ort-cpu", "openvino-cpu")


@pytest.fixture
def bundle(int8_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(int8_bundle, tmp_path / "int8"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with np.load(TEST) as data:
        path = tmp_path_factory.mktemp("data") / "fresh.npz"
        np.savez(path, image=data["image"][:300], labels=data["labels"][:300])
    return path


def test_a_certificate_says_what_was_asked_and_where_it_holds(
    bundle: Path, fashion_bundle: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = validate(bundle, fresh, against=fashion_bundle, max_drop=5, min_agreement=90, allow_overlap=False)
    before = read_calibration(open_bundle(bundle))

    (made,) = certify(bundle, [result])

    assert str(made).startswith(
        f"top-1 drop ≤ 5 points and agreement ≥ 90 % against fashion (ort-cpu, {made.engine}) with 95 % confidence"
        " each, 300 samples of "
    )
    assert made.reference_graphs == graphs_of(open_bundle(fashion_bundle).manifest, "ort-cpu", "fp32")
    assert made.device == cpu_name()
    assert read_calibration(open_bundle(bundle, verify="always")) == before  # nothing else of the record changed
    with load(bundle) as runtime:
        assert runtime.describe()["certificates"] == (str(made),)
    assert inspect_bundle(bundle).certificates == (str(made),)

    monkeypatch.setattr(certificates, "cpu_features", lambda: ("avx2",))
    with load(bundle) as runtime:
        assert "certificates" not in runtime.describe()
    inspection = inspect_bundle(bundle)
    assert inspection.certificates == ()
    assert inspection.certified_elsewhere[0].startswith("ort-cpu with onnxruntime")


def test_a_bundle_that_cannot_be_written_gets_a_hint_that_validate_can_follow(
    bundle: Path, fashion_bundle: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    result = validate(bundle, fresh, against=fashion_bundle, max_drop=5)
    monkeypatch.setattr(write, "_sync", read_only)
    with pytest.raises(ExportError, match="Read-only file system") as raised:
        certify(bundle, [result])

    assert raised.value.hint == "copy the bundle to where it can be written, and certify it there"


def test_a_bound_by_bootstrap_says_so_wherever_it_is_shown(bundle: Path, fashion_bundle: Path, fresh: Path) -> None:
    """It is less sure than an exact one, and a certificate goes further than the manual."""
    options: dict[str, Any] = {"against": fashion_bundle, "max_drop": 5, "allow_overlap": False}
    result = validate(bundle, fresh, **options, metric="kl", max_metric_change=1)
    exact, mean = result.gates

    (made,) = certify(bundle, [result])

    caveat = "the bound of kl is by bootstrap, which is too narrow where samples are few and skewed"
    assert made.caveats == (caveat,)
    assert str(made).endswith(f"; but {caveat}")
    assert "95 % bounds by bootstrap " in str(mean)
    assert "bootstrap" not in str(exact)
    note = Report("model", (result,)).gates.note
    assert note.startswith("Bounds of kl are by bootstrap, which is too narrow where samples are few and skewed.")
    assert Report("model", (validate(bundle, fresh, **options),)).gates.note == ""


def test_another_engine_or_another_graph_is_not_certified(bundle: Path, fashion_bundle: Path, fresh: Path) -> None:
    result = validate(bundle, fresh, against=fashion_bundle, max_drop=5)
    (made,) = certify(bundle, [result])
    opened = open_bundle(bundle)

    assert certificates.applies(made, opened, made.target, made.engine)
    assert not certificates.applies(made, opened, made.target, "onnxruntime 1.0.0")
    assert not certificates.applies(made, opened, "openvino-cpu", made.engine)
    changed = msgspec.structs.replace(made, graphs={**made.graphs, "model.weights": "0" * 64})
    assert not certificates.applies(changed, opened, made.target, made.engine)
    nameless = msgspec.structs.replace(made, reference_graphs={})
    assert not certificates.applies(nameless, opened, made.target, made.engine)
    assert certify(bundle, [result]) == (made,)  # a second time replaces the first
    assert certificates.certificates(open_bundle(bundle)) == (made,)


def test_an_fp32_bundle_is_certified_against_its_checkpoint(copied_bundle: Path, fresh: Path) -> None:
    weights = hashlib.sha256((FASHION / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()
    reference = load_reference(copied_bundle, str(FASHION / "checkpoint"))

    (made,) = certify(copied_bundle, [validate(copied_bundle, fresh, against=reference, max_drop=5, certifying=True)])

    assert (made.reference, made.reference_target) == ("checkpoint", "torch")
    assert made.reference_engine.startswith("torch 2.")
    assert made.reference_graphs == {"model.safetensors": weights}
    assert read_calibration(open_bundle(copied_bundle)) is None
    assert certificates.certificates(open_bundle(copied_bundle, verify="always")) == (made,)
    on_another_target = validate(copied_bundle, fresh, against_device="openvino-cpu", max_drop=5, certifying=True)
    (other,) = certify(copied_bundle, [on_another_target])
    assert other.reference_target == "openvino-cpu"
    assert certificates.certificates(open_bundle(copied_bundle)) == (made, other)  # another reference, another claim


def test_what_shows_nothing_is_no_reference(
    bundle: Path, int8_bundle: Path, fashion_bundle: Path, copied_bundle: Path, fresh: Path
) -> None:
    def never(feeds: Any) -> Any:
        raise AssertionError("it ran")

    float_model = load_model(FASHION / "checkpoint").run
    references: list[tuple[Path, dict[str, Any], str, str | None]] = [
        (copied_bundle, {"against": fashion_bundle}, "candidate itself, the same graphs on ort-cpu", "itself"),
        (bundle, {"against": int8_bundle}, "candidate itself, the same graphs on ort-cpu", "itself"),
        (bundle, {"against_device": "openvino-cpu"}, r"quantized itself \(int8\)", "quantized"),
        (bundle, {"against": float_model}, "no hash tells which", None),
    ]
    for candidate, options, message, kind in references:
        options |= {"min_agreement": 1, "samples": 60}
        result = validate(candidate, fresh, **options)
        assert result.held
        assert result.warning_kinds == (() if kind is None else (kind,))
        with pytest.raises(UsageError, match=message):
            certify(candidate, [result])
    with pytest.raises(UsageError, match="no hash tells which"):
        validate(bundle, fresh, against=never, max_drop=5, certifying=True)
    with pytest.raises(UsageError, match="runs in torch"):
        validate(bundle, fresh, against=never, against_device="ort-cpu")
    assert not open_bundle(copied_bundle).manifest.files.keys() & {"calibration.json"}


def test_another_bundle_than_was_validated_gets_no_certificate(
    bundle: Path, fashion_bundle: Path, copied_plain_bundle: Path, fresh: Path
) -> None:
    result = validate(copied_plain_bundle, fresh, against=fashion_bundle, min_agreement=90)

    with pytest.raises(UsageError, match=r"other graphs were validated than those that .* has for ort-cpu"):
        certify(bundle, [result])


def test_graphs_are_those_that_a_target_runs(
    bundle: Path, copied_bundle: Path, fashion_bundle: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [validate(bundle, fresh, device=target, against=fashion_bundle, max_drop=5) for target in CPUS]
    part = open_bundle(bundle).manifest.parts["model"]
    for result, file in zip(results, (part.lowered["ort-cpu"], part.file), strict=True):
        assert result.candidate["graphs"].keys() == {file, "model.weights"}

    lower_bundle(copied_bundle, "tensorrt", "fp16")
    lowered = open_bundle(copied_bundle)
    graphs = graphs_of(lowered.manifest, "tensorrt", "fp16")
    assert "model.tensorrt-fp16.onnx" in graphs
    assert "model.onnx" not in graphs
    assert graphs_of(lowered.manifest, "tensorrt", "fp32").keys() == {"model.onnx", "model.weights"}
    (made,) = certify(bundle, results[:1])
    engine, device = "tensorrt 10.3.0, in fp16", "NVIDIA Orin (sm_87)"
    on_gpu = msgspec.structs.replace(made, target="tensorrt", engine=engine, device=device, graphs=graphs)
    monkeypatch.setattr(certificates, "device_of", lambda target: device)
    assert certificates.applies(on_gpu, lowered, "tensorrt", engine)
    canonical = msgspec.structs.replace(on_gpu, graphs=graphs_of(lowered.manifest, "tensorrt", "fp32"))
    assert not certificates.applies(canonical, lowered, "tensorrt", engine)
    monkeypatch.setattr(certificates, "device_of", lambda target: "NVIDIA RTX A4000 (sm_86)")
    assert not certificates.applies(on_gpu, lowered, "tensorrt", engine)
    assert f", tensorrt on {device}, {engine}, " in str(on_gpu)


def test_an_engine_of_a_lowered_graph_is_one_of_this_bundle(copied_bundle: Path) -> None:
    """`load` without a precision takes what was built last, whose graph may not be the one of fp32."""
    lower_bundle(copied_bundle, "tensorrt", "fp16")
    opened, backend = open_bundle(copied_bundle), find_target("tensorrt").backend()
    part, platform = opened.part(), Platform("tensorrt", "10.3.0", "NVIDIA Orin (sm_87)")
    built, asked = (
        identify(opened, "model", make_source(opened, part, "tensorrt", EngineOptions(precision=precision)), platform)
        for precision in get_args(Precision)[1::-1]
    )

    assert built.options.precision == "fp16"
    assert built.model != asked.model
    assert mismatches(opened, built, asked, backend) == ()
    stranger = msgspec.structs.replace(built, model=asked.model)
    assert mismatches(opened, stranger, asked, backend) == ("it was built from another model",)


def test_without_evidence_there_is_no_certificate(
    bundle: Path, fashion_bundle: Path, ruined: Path, fresh: Path, tmp_path: Path
) -> None:
    with np.load(TEST) as data:
        one = data["labels"] == 3
        np.savez(tmp_path / "one.npz", image=data["image"][one][:100], labels=data["labels"][one][:100])
    content = {file.name: file.read_bytes() for file in bundle.iterdir()}

    with pytest.raises(UsageError, match="a gate held"):
        certify(bundle, [validate(bundle, fresh, against=fashion_bundle)])
    with pytest.raises(UndecidedError):
        certify(bundle, [validate(bundle, fresh, against=fashion_bundle, max_drop=0.01)])
    with pytest.raises(GateError, match="not held"):
        certify(ruined, [validate(ruined, fresh, against=fashion_bundle, max_drop=1)])
    with pytest.raises(DataError, match="one label"):
        certify(bundle, [validate(bundle, tmp_path / "one.npz", against=fashion_bundle, max_drop=20)])
    with np.load(TEST) as data:
        wrong = (data["labels"][:300].astype(int) + 1) % 10
        np.savez(tmp_path / "wrong.npz", image=data["image"][:300], labels=wrong)
    with pytest.raises(DataError, match="no better than chance"):
        certify(bundle, [validate(bundle, tmp_path / "wrong.npz", against=fashion_bundle, max_drop=20)])
    assert content == {file.name: file.read_bytes() for file in bundle.iterdir()}


def test_samples_that_were_calibrated_on_are_found(bundle: Path, fashion_bundle: Path, tmp_path: Path) -> None:
    record = json.loads((bundle / "calibration.json").read_bytes())
    used, held_out = set(record["data"]["digests"]), FASHION / "held_out.npz"

    result = validate(bundle, held_out, against=fashion_bundle, samples=130)
    assert len(used) == 32  # spread evenly over 2,000
    assert result.warnings[0].startswith("3 of 130 samples")
    with pytest.raises(DataError, match=r"3 of 130 samples .* were calibrated or searched on"):
        validate(bundle, held_out, against=fashion_bundle, samples=130, max_drop=1, allow_overlap=False)
    (made,) = certify(bundle, [validate(bundle, held_out, against=fashion_bundle, samples=130, max_drop=20)])
    assert made.caveats == (result.warnings[0],)
    assert "; but 3 of 130 samples" in inspect_bundle(bundle).certificates[0]
    with np.load(TEST) as data:
        np.savez(
            tmp_path / "twice.npz", image=np.repeat(data["image"][:40], 2, 0), labels=data["labels"][:40].repeat(2)
        )
    with pytest.raises(DataError, match=r"40 of 80 samples .* are repeated"):
        validate(bundle, tmp_path / "twice.npz", allow_overlap=False)
