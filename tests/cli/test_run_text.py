# SPDX-License-Identifier: Apache-2.0
"""`run` on bundles that read text: where texts come from, what is printed and written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perceiver_export.exporter.cli.run_options import RunOptions
from perceiver_export.exporter.cli.run_text import run_classification, run_fill_mask
from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.tasks.fill_mask import FillMask
from perceiver_export.runtimes.tasks.prediction import Prediction
from perceiver_export.runtimes.tasks.text_classification import TextClassification
from tests.runtimes.text_models import (
    BATCHES,
    LABELS,
    MASKED,
    SENTENCE,
    TASKS,
    Size,
    classification,
    classifier,
    fill_mask,
    language_model,
)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[FillMask | TextClassification], None]:
    """`open_task` gives this task."""

    def patch(task: FillMask | TextClassification) -> None:
        monkeypatch.setattr("perceiver_export.runtimes.tasks.open_task", lambda *_: task)

    return patch


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))


TABLE, JSON = RunOptions(3, "auto", None, json=False), RunOptions(3, "auto", None, json=True)


@pytest.mark.parametrize("split", [False, True])
def test_the_command_shows_the_filled_text_and_the_candidates(split: bool, opened: Any, capsys: Any) -> None:
    opened(fill_mask(language_model(split)))
    run_fill_mask("BUNDLE", [MASKED, "Two[MASK]bytes"], None, TABLE)

    shown = capsys.readouterr().out
    assert SENTENCE in shown.splitlines()
    assert "BUNDLE on numpy 0, cpu" in shown
    assert "Two bytes" in shown.splitlines()
    assert "␣  " in shown
    headers = [line for line in shown.splitlines() if "position" in line]
    assert [line.replace("┃", "").split() for line in headers] == [["position", "1.", "2.", "3."]] * 2


def test_a_file_is_one_text_to_fill(opened: Any, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "text.TXT").write_bytes(b"\xef\xbb\xbfTwo\nbytes[MASK]\r\n")
    stdin(monkeypatch, b"[MASK]wo\n")
    opened(fill_mask(language_model(split=False)))
    run_fill_mask("BUNDLE", [str(tmp_path / "text.TXT"), "-"], tmp_path / "out.json", JSON)

    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out.json").read_bytes())
    first, second = printed["answers"]
    assert first["source"] == str(tmp_path / "text.TXT")
    assert first["input"] == "Two\nbytes[MASK]"
    assert first["text"] == "Two\nbytes "
    assert first["blanks"][0]["position"] == 10
    assert len(first["blanks"][0]["candidates"]) == 3
    assert set(first["blanks"][0]["candidates"][0]) == {"token", "symbol", "probability"}
    assert (second["source"], second["text"]) == ("-", "Two")
    assert printed["runtime"]["engine"] == "numpy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "text.TXT"]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_a_file_has_a_text_a_line_to_classify(batch: Size, opened: Any, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes("first\r\n\n  \nzweite Zeile\u2028hier\nthird\nfourth\nfifth".encode())
    opened(classification(classifier(False, {"logits": 3}, batch, labels=LABELS)))
    run_classification("BUNDLE", ["an argument", str(tmp_path / "texts.txt")], None, JSON)

    answers = json.loads(capsys.readouterr().out)["answers"]
    lines = ["first", "zweite Zeile\u2028hier", "third", "fourth", "fifth"]
    assert [answer["input"] for answer in answers] == ["an argument", *lines]
    sources = [None, *(f"{tmp_path / 'texts.txt'}:{number}" for number in (1, 4, 5, 6, 7))]
    assert [answer["source"] for answer in answers] == sources
    with classification(classifier(False, {"logits": 3}, labels=LABELS)) as classify:
        for answer in answers:
            found = [Prediction(**prediction) for prediction in answer["labels"]]
            assert found == classify(answer["input"], top=3)


def test_the_command_shows_labels_or_the_scores_of_tasks(opened: Any, capsys: Any) -> None:
    opened(classification(classifier(False, {"logits": 3}, labels=LABELS)))
    run_classification("BUNDLE", ["\x1b[31mred", "x" * 38], None, RunOptions(2, "auto", None, json=False))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "shouting  " in shown
    assert "3." not in shown

    opened(classification(classifier(True, TASKS)))
    run_classification("BUNDLE", ["abc"], None, TABLE)
    shown = capsys.readouterr().out
    assert all(name in shown for name in TASKS)
    assert "0.5  10.5  10.3" in shown

    opened(classification(classifier(True, TASKS)))
    run_classification("BUNDLE", ["abc"], None, JSON)
    found = json.loads(capsys.readouterr().out)["answers"][0]["scores"]
    assert {name: len(values) for name, values in found.items()} == TASKS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\n\xe9t\xe9\n", r"bad\.txt: the text is not valid UTF-8: byte 0xe9 at offset 5"),
        (b"good\n" + b"x" * 50, r"bad\.txt:2: the text has 50 bytes, 38 fit"),
        (b"\n \n", r"bad\.txt holds no text"),
        (b"", r"bad\.txt holds no text"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(
    content: bytes, message: str, opened: Any, tmp_path: Path, capsys: Any
) -> None:
    bundle = classifier(False, {"logits": 3}, labels=LABELS)
    opened(classification(bundle))
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        run_classification("BUNDLE", ["good", str(tmp_path / "bad.txt")], tmp_path / "out.json", TABLE)

    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out.json").exists()
    assert bundle.calls() == {}


def test_inputs_and_outputs_that_are_not_there(opened: Any, tmp_path: Path, monkeypatch: Any) -> None:
    bundle = language_model(False)
    opened(fill_mask(bundle))
    (tmp_path / "folder.txt").mkdir()
    stdin(monkeypatch, b"")
    for argument, message in (
        (str(tmp_path / "absent.txt"), "No such file"),
        (str(tmp_path / "folder.txt"), "Is a directory"),
        ("[MASK]" + "x" * 5000 + ".txt", "too long"),
        ("-", "standard input holds no text"),
        ("caf\udce9 [MASK]", "not valid UTF-8"),
        ("nothing masked", r"no \[MASK\]"),
    ):
        with pytest.raises(InputError, match=message):
            run_fill_mask("BUNDLE", [argument], None, TABLE)
    for output in (tmp_path, tmp_path / "absent" / "out.json"):
        with pytest.raises(InputError, match="cannot be written"):
            run_fill_mask("BUNDLE", [MASKED], output, TABLE)

    assert bundle.calls() == {}
