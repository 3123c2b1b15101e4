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

from perceiver_export.calibration import Validation
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.calibration.report.tables import Report
from perceiver_export.calibration.validation.certify import certify
from perceiver_export.exporter import ExportOptions, export, load_model, load_reference
from perceiver_export.exporter.describe import inspect_bundle
from perceiver_export.runtimes import build, certificates, files, load, open_bundle
from perceiver_export.runtimes.bundle import change_report
from perceiver_export.runtimes.engines.backend import EngineOptions, Platform, Precision, find_target
from perceiver_export.runtimes.engines.cache import graphs_of, identify, make_source, mismatches
from perceiver_export.runtimes.errors import DataError, ExportError, UndecidedError, UsageError, VacuousGateError
from perceiver_export.runtimes.figures import platform_of
from perceiver_export.runtimes.machine import cpu_name
from perceiver_export.runtimes.presence import precision_advice
from tests.calibration.asked import judged, pictures
from tests.calibration.damaged_scales import rehashed
from tests.conftest import FASHION
from tests.runtimes.targets import latencies

CPUS = ("ort-cpu", "openvino-cpu")


@pytest.fixture
def bundle(copied_int8: Path) -> Path:
    return copied_int8


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "fresh.npz", slice(0, 300))


@pytest.fixture(scope="module")
def on(int8_bundle: Path, fashion_bundle: Path, fresh: Path) -> dict[str, Validation]:
    """The int8 bundle, whose copies have the same graphs, validated on each CPU target."""
    return {name: judged(int8_bundle, fresh, device=name, against=fashion_bundle, max_drop=5) for name in CPUS}


def described(bundle: Path, **options: Any) -> tuple[str, tuple[str, ...]]:
    """The target that `load` takes, and the certificates that hold there."""
    with load(bundle, **options) as runtime:
        return runtime.describe()["target"], runtime.describe().get("certificates", ())


def test_a_certificate_says_what_was_asked_and_where_it_holds(
    bundle: Path, fashion_bundle: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = judged(bundle, fresh, against=fashion_bundle, max_drop=5, min_agreement=90, certify=True)
    before = read_calibration(open_bundle(bundle))

    (made,) = certify(bundle, [result])

    assert str(made).startswith(
        f"top-1 drop ≤ 5 points and agreement ≥ 90 % against fashion (ort-cpu, {made.engine}), each with 95 %"
        " confidence, 300 samples ("
    )
    assert str(made).count("ort-cpu") == 1  # the same for both
    assert made.reference_graphs == graphs_of(open_bundle(fashion_bundle).manifest, "ort-cpu", "fp32")
    assert made.device == cpu_name()
    assert made.labels == result.data.labels
    assert (len(made.labels), sum(made.labels.values())) == (10, 300)
    without = {name: value for name, value in msgspec.to_builtins(made).items() if name != "labels"}
    assert msgspec.convert(without, certificates.Certificate).labels == {}  # of an older version
    assert "(10 labels, " in str(made)
    assert not set(made.instruction_set[:-1]) & set(str(made).split())  # inspect --json has them all
    assert read_calibration(open_bundle(bundle, verify="always")) == before  # nothing else of the record changed
    assert described(bundle)[1] == (str(made),)
    assert inspect_bundle(bundle).certificates == (made,)

    monkeypatch.setattr(certificates, "cpu_features", lambda: ("avx2",))
    assert described(bundle)[1] == ()
    inspection = inspect_bundle(bundle)
    assert inspection.certificates == ()
    assert inspection.certified_elsewhere[0].startswith("ort-cpu with onnxruntime")
    assert inspection.certified_elsewhere[0].endswith(", ".join(made.instruction_set))


def test_auto_runs_a_certified_bundle_where_it_is_certified(
    bundle: Path, on: dict[str, Validation], caplog: pytest.LogCaptureFixture
) -> None:
    """Though another target was measured to be faster; `inspect` says what `describe` says."""
    measured = latencies("int8", openvino_cpu=1.0, ort_cpu=2.0)
    change_report(bundle, "bench", lambda _: {cpu_name(): measured})
    assert described(bundle) == ("openvino-cpu", ())

    (ort,) = certify(bundle, [on["ort-cpu"]])
    with caplog.at_level("INFO", "perceiver_export"):
        assert described(bundle) == ("ort-cpu", (str(ort),))
    assert "auto chose ort-cpu" in caplog.text
    assert described(bundle, device="openvino-cpu") == ("openvino-cpu", ())
    inspected = inspect_bundle(bundle)
    assert (inspected.certificates, inspected.certified_with, inspected.certified_elsewhere) == ((ort,), {}, ())

    (both,) = certify(bundle, [on["openvino-cpu"]])
    assert described(bundle) == ("openvino-cpu", (str(both),))
    inspected = inspect_bundle(bundle)
    assert (inspected.certificates, inspected.certified_with) == ((both,), {"--device ort-cpu": (ort,)})


def test_auto_takes_a_precision_only_where_it_is_faster_and_certified(
    copied_plain_bundle: Path, fashion_bundle: Path, fresh: Path
) -> None:
    bundle = copied_plain_bundle

    def taken(**options: Any) -> str:
        with load(bundle, precision="auto", **options) as runtime:
            return str(runtime.describe()["precision"])

    def measured(*quartiles: float) -> None:
        times = {"fp32": (1.0, 1.0, 1.0), "fp16": quartiles}
        kept = {"openvino-cpu": {"platform": platform_of("openvino-cpu"), "times": times}}
        change_report(bundle, "precisions", lambda _: {cpu_name(): kept})

    measured(0.5, 0.6, 0.7)
    assert taken(device="openvino-cpu") == "fp32"
    assert "validate" in precision_advice(open_bundle(bundle), "openvino-cpu")
    asked = {"device": "openvino-cpu", "precision": "fp16", "against": fashion_bundle}
    certify(bundle, [judged(bundle, fresh, **asked, samples=60, min_agreement=90)])
    assert taken() == taken(device="openvino-cpu") == "fp16"
    assert taken(device="ort-cpu") == "fp32"
    assert build(bundle, "openvino-cpu", precision="auto")[0].precision == "fp16"
    for unlike in ({"flags": {"NUM_STREAMS": "1"}}, {"hint": "throughput"}):  # measured were engines without
        with pytest.raises(UsageError, match=r"NUM_STREAMS|throughput"):
            build(bundle, "openvino-cpu", precision="auto", **unlike)
    assert taken(device="openvino-cpu", threads=1) == "fp32"  # not measured with one
    measured(0.9, 0.95, 1.05)  # a tie
    assert taken(device="openvino-cpu") == "fp32"
    assert precision_advice(open_bundle(bundle), "openvino-cpu") == ""
    change_report(bundle, "precisions", lambda _: {"another CPU": {}})
    assert taken(device="openvino-cpu") == "fp32"


def test_a_certificate_of_a_split_bundle_needs_its_precision_in_every_part(
    fashion_bundle: Path, fresh: Path, tmp_path: Path
) -> None:
    bundle = export(FASHION / "checkpoint", tmp_path / "split", ExportOptions(split=True)).path
    asked = {"device": "openvino-cpu", "precision": "fp16", "against": fashion_bundle}
    (made,) = certify(bundle, [judged(bundle, fresh, **asked, samples=60, min_agreement=90)])
    built = {one.part: one for one in build(bundle, "openvino-cpu", precision="fp16")}
    assert described(bundle) == ("openvino-cpu", (str(made),))

    shutil.rmtree(built["decoder"].directory)  # which is then compiled at load, in fp32
    with load(bundle, "openvino-cpu") as runtime:
        assert runtime.describe()["precision"] == "fp16, fp32"
        assert "certificates" not in runtime.describe()


def test_where_the_certified_target_is_not_here_auto_takes_another(bundle: Path, on: dict[str, Validation]) -> None:
    (made,) = certify(bundle, [on["ort-cpu"]])
    calibration = bundle / "calibration.json"
    pairs = ('"target": "ort-cpu",\n      "engine"', '"target": "openvino-npu",\n      "engine"')
    calibration.write_text(calibration.read_text("utf-8").replace(*pairs), "utf-8")
    rehashed(bundle)

    assert described(bundle) == ("ort-cpu", ())
    inspected = inspect_bundle(bundle)
    assert (inspected.certificates, inspected.certified_with) == ((), {})
    assert inspected.certified_elsewhere == (f"openvino-npu with {made.engine} on {made.device}",)


def test_a_certificate_of_an_engine_holds_where_load_takes_that_engine(copied_plain_bundle: Path, fresh: Path) -> None:
    """The one that was built last; an older one is taken by its precision. Its reference may be itself in fp32."""
    bundle = copied_plain_bundle
    build(bundle, "openvino-cpu", precision="fp16")
    result = judged(bundle, fresh, device="openvino-cpu", against=bundle, samples=60, min_agreement=90, certify=True)
    (made,) = certify(bundle, [result])
    assert inspect_bundle(bundle).certificates == (made,)
    assert described(bundle)[1] == (str(made),)

    build(bundle, "openvino-cpu")
    assert described(bundle)[1] == ()
    assert described(bundle, precision="fp16")[1] == (str(made),)
    inspected = inspect_bundle(bundle)
    assert inspected.certificates == ()
    assert inspected.certified_with == {"--device openvino-cpu --precision fp16": (made,)}


def test_a_bundle_that_cannot_be_written_gets_a_hint_that_validate_can_follow(
    bundle: Path, on: dict[str, Validation], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "sync", read_only)
    with pytest.raises(ExportError, match="Read-only file system") as raised:
        certify(bundle, [on["ort-cpu"]])

    assert raised.value.hint == "copy the bundle to a writable place, and certify it there"


def test_a_bound_by_bootstrap_says_so_wherever_it_is_shown(
    bundle: Path, fashion_bundle: Path, fresh: Path, on: dict[str, Validation]
) -> None:
    """It is less sure than an exact one, and a certificate goes further than the manual."""
    result = judged(bundle, fresh, against=fashion_bundle, max_drop=5, metric="kl", max_metric_change=1, certify=True)
    exact, mean = result.gates

    (made,) = certify(bundle, [result])

    caveat = "the bound of kl is by bootstrap, which is too narrow where samples are few and skewed"
    assert made.caveats == (caveat,)
    assert str(made).endswith(f"; but {caveat}")
    assert "with 95 % confidence by bootstrap " in str(mean)
    assert "bootstrap" not in str(exact)
    note = Report("model", (result,)).gates.note
    assert note.startswith("Bounds of kl are by bootstrap, which is too narrow where samples are few and skewed.")
    assert Report("model", (on["ort-cpu"],)).gates.note == ""


def test_a_very_wide_margin_is_said_wherever_the_gate_is(bundle: Path, fashion_bundle: Path, fresh: Path) -> None:
    wide = judged(bundle, fresh, against=fashion_bundle, samples=60, max_drop=60, min_agreement=79)
    relative = judged(bundle, fresh, against=fashion_bundle, samples=60, max_metric_change=21, metric="top-5")

    assert wide.warning_kinds == relative.warning_kinds == ("wide",)
    for gate in wide.gates:
        assert gate.reservations == wide.warnings
    assert "--max-drop 60" in wide.warnings[0]
    assert "--min-agreement 79" in wide.warnings[0]
    (made,) = certify(bundle, [wide])
    assert made.caveats == wide.warnings
    report = Report("model", (wide,))
    assert report.warnings == report.reservations == wide.warnings


def test_another_engine_or_another_graph_is_not_certified(bundle: Path, on: dict[str, Validation]) -> None:
    (made,) = certify(bundle, [on["ort-cpu"]])
    opened = open_bundle(bundle)

    assert certificates.applies(made, opened, made.target, made.engine)
    assert not certificates.applies(made, opened, made.target, "onnxruntime 1.0.0")
    assert not certificates.applies(made, opened, "openvino-cpu", made.engine)
    changed = msgspec.structs.replace(made, graphs={**made.graphs, "model.weights": "0" * 64})
    assert not certificates.applies(changed, opened, made.target, made.engine)
    nameless = msgspec.structs.replace(made, reference_graphs={})
    assert not certificates.applies(nameless, opened, made.target, made.engine)
    assert certify(bundle, [on["ort-cpu"]]) == (made,)  # a second time replaces the first
    assert certificates.certificates(open_bundle(bundle)) == (made,)


def test_an_fp32_bundle_is_certified_against_its_checkpoint(copied_bundle: Path, fresh: Path) -> None:
    weights = hashlib.sha256((FASHION / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()
    reference = load_reference(copied_bundle, str(FASHION / "checkpoint"))

    (made,) = certify(
        copied_bundle, [judged(copied_bundle, fresh, against=reference, samples=100, max_drop=5, certify=True)]
    )

    assert (made.reference, made.reference_target) == ("checkpoint", "torch")
    assert made.reference_engine.startswith("torch 2.")
    assert made.reference_graphs == {"model.safetensors": weights}
    assert read_calibration(open_bundle(copied_bundle)) is None
    assert certificates.certificates(open_bundle(copied_bundle, verify="always")) == (made,)
    on_another_target = judged(
        copied_bundle, fresh, against_device="openvino-cpu", samples=100, max_drop=5, certify=True
    )
    (other,) = certify(copied_bundle, [on_another_target])
    assert other.reference_target == "openvino-cpu"
    assert certificates.certificates(open_bundle(copied_bundle)) == (made, other)  # another reference, another claim


def test_what_shows_nothing_is_no_reference(
    bundle: Path, int8_bundle: Path, fashion_bundle: Path, copied_bundle: Path, fresh: Path
) -> None:
    float_model = load_model(FASHION / "checkpoint").run
    references: list[tuple[Path, dict[str, Any], str, str | None]] = [
        (copied_bundle, {"against": fashion_bundle}, "candidate itself, the same graphs on ort-cpu", "itself"),
        (bundle, {"against": int8_bundle}, "candidate itself, the same graphs on ort-cpu", "itself"),
        (bundle, {"against_device": "openvino-cpu"}, r"itself quantized \(int8\)", "quantized"),
        (bundle, {"against": float_model}, "has no hash", None),
    ]
    for candidate, options, message, kind in references:
        options |= {"min_agreement": 80, "samples": 60}
        result = judged(candidate, fresh, **options)
        assert (result.held, result.warning_kinds) == (True, () if kind is None else (kind,))
        with pytest.raises(UsageError, match=message):
            certify(candidate, [result])
        with pytest.raises(UsageError, match=message):
            judged(candidate, fresh, **options, certify=True)
    with pytest.raises(UsageError, match="runs in torch"):
        judged(bundle, fresh, against=float_model, against_device="ort-cpu")
    assert not open_bundle(copied_bundle).manifest.files.keys() & {"calibration.json"}


def test_another_bundle_than_was_validated_gets_no_certificate(
    bundle: Path, fashion_bundle: Path, copied_plain_bundle: Path, fresh: Path
) -> None:
    result = judged(copied_plain_bundle, fresh, against=fashion_bundle, samples=60, min_agreement=90)

    with pytest.raises(UsageError, match="does not have the graphs that were validated"):
        certify(bundle, [result])


def test_graphs_are_those_that_a_target_runs(
    bundle: Path, lowered_bundle: Path, on: dict[str, Validation], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = list(on.values())
    part = open_bundle(bundle).manifest.parts["model"]
    for result, file in zip(results, (part.lowered["ort-cpu"], part.file), strict=True):
        assert result.candidate["graphs"].keys() == {file, "model.weights"}

    lowered = open_bundle(lowered_bundle)
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
    assert all(datum in str(on_gpu) for datum in ("tensorrt", engine, device))
    assert msgspec.structs.replace(on_gpu, device="").place.strip()


def test_an_engine_of_a_lowered_graph_is_one_of_this_bundle(lowered_bundle: Path) -> None:
    """`load` without a precision takes what was built last, whose graph may not be the one of fp32."""
    opened, backend = open_bundle(lowered_bundle), find_target("tensorrt").backend()
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


@pytest.mark.parametrize(
    ("data", "gates", "error", "said"),
    [
        ({}, {}, UsageError, "a certificate needs a gate"),
        ({}, {"max_drop": 0.01}, UndecidedError, "^NOT ENOUGH DATA"),
        ({"of_class": 3}, {"max_drop": 20}, VacuousGateError, "always answering 'Dress' passes too"),
        ({"of_class": 3}, {"min_agreement": 93}, DataError, "the same label"),
        ({"shift": 1}, {"min_agreement": 90}, DataError, "no better than chance"),
    ],
)
def test_without_evidence_there_is_no_certificate(
    data: dict[str, Any],
    gates: dict[str, Any],
    error: type[Exception],
    said: str,
    bundle: Path,
    fashion_bundle: Path,
    tmp_path: Path,
) -> None:
    content = {file.name: file.read_bytes() for file in bundle.iterdir()}
    path = pictures(tmp_path / "data.npz", slice(0, 100 if "of_class" in data else 300), **data)

    with pytest.raises(error, match=said):
        certify(bundle, [judged(bundle, path, against=fashion_bundle, **gates)])
    assert content == {file.name: file.read_bytes() for file in bundle.iterdir()}


def test_samples_that_were_calibrated_on_are_found(bundle: Path, fashion_bundle: Path, tmp_path: Path) -> None:
    record = json.loads((bundle / "calibration.json").read_bytes())
    used, held_out = set(record["data"]["digests"]), FASHION / "held_out.npz"

    result = judged(bundle, held_out, against=fashion_bundle, samples=130)
    assert len(used) == 32  # spread evenly over 2,000
    assert result.warnings[0].startswith("2 of 130 samples")
    with pytest.raises(DataError, match="2 of 130 samples"):
        judged(bundle, held_out, against=fashion_bundle, samples=130, max_drop=1, certify=True)
    (made,) = certify(bundle, [judged(bundle, held_out, against=fashion_bundle, samples=130, max_drop=20)])
    assert made.caveats == (result.warnings[0],)
    assert "; but 2 of 130 samples" in str(inspect_bundle(bundle).certificates[0])
    twice = pictures(tmp_path / "twice.npz", np.arange(40).repeat(2))
    with pytest.raises(DataError, match=r"40 of 80 samples .* are repeated"):
        judged(bundle, twice, against=fashion_bundle, max_drop=5, certify=True)
