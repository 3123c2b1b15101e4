# SPDX-License-Identifier: Apache-2.0
"""Certificates: written only on evidence, shown only where they hold, and gone with what they were about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from perceiver_export.calibration import validate
from perceiver_export.calibration.certificate import certify
from perceiver_export.calibration.record import read_calibration
from perceiver_export.exporter.inspection import inspect_bundle
from perceiver_export.runtimes import certificates, load, open_bundle
from perceiver_export.runtimes.errors import DataError, GateError, UndecidedError, UsageError

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
TEST = FASHION / "test.npz"


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
        "top-1 drop ≤ 5 points and agreement ≥ 90 % against fashion with 95 % confidence each, 300 samples of "
    )
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


def test_another_engine_or_another_graph_is_not_certified(bundle: Path, fashion_bundle: Path, fresh: Path) -> None:
    result = validate(bundle, fresh, against=fashion_bundle, max_drop=5)
    (made,) = certify(bundle, [result])
    opened = open_bundle(bundle)

    assert certificates.applies(made, opened, made.target, made.engine)
    assert not certificates.applies(made, opened, made.target, "onnxruntime 1.0.0")
    assert not certificates.applies(made, opened, "openvino-cpu", made.engine)
    changed = msgspec.structs.replace(made, graphs={**made.graphs, "model.weights": "0" * 64})
    assert not certificates.applies(changed, opened, made.target, made.engine)
    assert certify(bundle, [result]) == (made,)  # a second time replaces the first
    assert certificates.certificates(open_bundle(bundle)) == (made,)


def test_an_fp32_bundle_can_be_certified_too(copied_bundle: Path, fashion_bundle: Path, fresh: Path) -> None:
    result = validate(copied_bundle, fresh, against=fashion_bundle, max_drop=5)

    (made,) = certify(copied_bundle, [result])

    assert read_calibration(open_bundle(copied_bundle)) is None
    assert certificates.certificates(open_bundle(copied_bundle, verify="always")) == (made,)


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
        certify(bundle, [validate(ruined, fresh, against=fashion_bundle, max_drop=1)])
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
