# SPDX-License-Identifier: Apache-2.0
"""`run` on arrays: what it writes and prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from perceiver_export.exporter.cli.answers import Request
from perceiver_export.exporter.cli.output import quiet
from perceiver_export.exporter.cli.run import run_task
from perceiver_export.runtimes.errors import InputError, UsageError
from perceiver_export.runtimes.tasks.arrays import Arrays, Sets
from tests.runtimes.array_models import LEFT, RIGHT, RNG, TOTALS, C, E, arrays_of, sets_of
from tests.runtimes.models import spec


def opened_as(monkeypatch: pytest.MonkeyPatch, task: Arrays | Sets) -> None:
    monkeypatch.setattr("perceiver_export.runtimes.tasks.open_task", lambda *_: task)


def run(*inputs: Path, output: Path | None = None, json: bool = False) -> None:
    with quiet(json=json):
        run_task("arrays", Request("bundle", list(map(str, inputs)), output))


def test_run_writes_the_outputs_and_prints_what_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # `file` is what numpy.savez calls its own first parameter.
    inputs = (spec("left", 1, 2, 3), spec("right", 1, 4, dtype="int32"))
    opened_as(monkeypatch, arrays_of(*inputs, outputs=("total", "file"))[0])
    np.savez(tmp_path / "in.npz", left=LEFT, right=RIGHT)
    run(tmp_path / "in.npz", output=tmp_path / "out.npz")

    shown = capsys.readouterr().out
    assert "5 × 1" in shown
    assert f"{TOTALS.max():.6g}"[:5] in shown
    with np.load(tmp_path / "out.npz") as written:
        assert sorted(written.files) == ["file", "total"]
        np.testing.assert_allclose(written["file"], TOTALS[:, None], rtol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.npz", "out.npz"]


def test_run_prints_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened_as(monkeypatch, arrays_of(spec("x", 1, 3))[0])
    np.save(tmp_path / "x.npy", np.array([[1, 2, 3.0], [4, 5, 6.0]]))
    run(tmp_path / "x.npy", json=True)

    total = json.loads(capsys.readouterr().out)["outputs"]["total"]
    assert total == {"dtype": "float32", "shape": [2, 1], "min": 6.0, "mean": 10.5, "max": 15.0}


def test_run_takes_sets_from_both_kinds_of_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entities = RNG.normal(size=(3, C))
    np.save(tmp_path / "a.npy", entities)
    np.savez(tmp_path / "a.npz", entities=entities, entities_mask=np.array([1, 1, 1]))
    np.savez(tmp_path / "wrong.npz", units=entities)
    shown = []
    for name in ("a.npy", "a.npz"):
        opened_as(monkeypatch, sets_of()[0])
        run(tmp_path / name, json=True)
        shown.append(json.loads(capsys.readouterr().out)["outputs"]["outputs"])

    assert shown[0] == shown[1]
    assert shown[0]["shape"] == [3, E]
    with pytest.raises(InputError, match="'units'"):
        run(tmp_path / "wrong.npz")


def test_run_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task, engine = arrays_of(spec("x", 1, 3))
    opened_as(monkeypatch, task)
    np.save(tmp_path / "x.npy", np.zeros((1, 3), np.float32))
    file = tmp_path / "x.npy"
    for inputs, output in (([file, file], None), ([file], tmp_path / "out.npy"), ([file], tmp_path)):
        with pytest.raises(UsageError):
            run(*inputs, output=output)

    assert not engine.calls
