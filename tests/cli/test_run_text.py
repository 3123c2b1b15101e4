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

from perceiver_export.exporter.cli.answers import Request
from perceiver_export.exporter.cli.output import quiet
from perceiver_export.exporter.cli.run import run_task
from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.tasks.base import Prediction
from perceiver_export.runtimes.tasks.text import FillMask, TextClassification
from tests.runtimes import text_models
from tests.runtimes.text_models import LABELS, MASKED, SENTENCE, TASKS, classification, classifier, fill_mask

Ask = Callable[..., Any]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """`run` on a task: the answers of its JSON, or with ``as_json=False`` what it prints."""

    def run(task: FillMask | TextClassification, *inputs: str | Path, as_json: bool = True, **options: Any) -> Any:
        monkeypatch.setattr("perceiver_export.runtimes.tasks.open_task", lambda *_: task)
        name = "fill-mask" if isinstance(task, FillMask) else "text-classification"
        request = Request("BUNDLE", list(map(str, inputs)), **options)
        try:
            with quiet(json=as_json):
                run_task(name, request)
        finally:
            shown = capsys.readouterr().out
        return json.loads(shown)["answers"] if as_json else shown

    return run


def labelled() -> TextClassification:
    return classification(classifier(False, {"logits": 3}, labels=LABELS))


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))


@pytest.mark.parametrize("split", [False, True])
def test_the_command_shows_the_filled_text_and_the_candidates(split: bool, ask: Ask) -> None:
    shown = ask(fill_mask(text_models.language_model(split)), MASKED, "Two[MASK]bytes", as_json=False)

    assert SENTENCE in shown.splitlines()
    assert "BUNDLE on numpy 0, cpu" in shown
    assert "Two bytes" in shown.splitlines()
    assert "␣  " in shown
    headers = [line for line in shown.splitlines() if "position" in line]
    assert [line.replace("┃", "").split() for line in headers] == [["position", "1.", "2.", "3."]] * 2


def test_a_file_is_one_text_to_fill(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.TXT").write_bytes(b"\xef\xbb\xbfTwo\nbytes[MASK]\r\n")
    stdin(monkeypatch, b"[MASK]wo\n")
    task = fill_mask(text_models.language_model(split=False))
    first, second = printed = ask(task, tmp_path / "text.TXT", "-", output=tmp_path / "out.json")

    written = json.loads((tmp_path / "out.json").read_bytes())
    assert printed == written["answers"]
    assert (first["source"], first["input"]) == (str(tmp_path / "text.TXT"), "Two\nbytes[MASK]")
    assert first["text"] == "Two\nbytes "
    assert first["blanks"][0]["position"] == 10
    assert len(first["blanks"][0]["candidates"]) == 3
    assert set(first["blanks"][0]["candidates"][0]) == {"token", "symbol", "probability"}
    assert (second["source"], second["text"]) == ("-", "Two")
    assert written["runtime"]["engine"] == "numpy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "text.TXT"]


@pytest.mark.parametrize("batch", text_models.BATCHES, ids=str)
def test_a_file_has_a_text_a_line_to_classify(batch: text_models.Size, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes("first\r\n\n  \nzweite Zeile\u2028hier\nthird\nfourth\nfifth".encode())
    task = classification(classifier(False, {"logits": 3}, batch, labels=LABELS))
    answers = ask(task, "an argument", tmp_path / "texts.txt")

    lines = ["first", "zweite Zeile\u2028hier", "third", "fourth", "fifth"]
    assert [answer["input"] for answer in answers] == ["an argument", *lines]
    sources = [None, *(f"{tmp_path / 'texts.txt'}:{number}" for number in (1, 4, 5, 6, 7))]
    assert [answer["source"] for answer in answers] == sources
    with labelled() as alone:
        for answer in answers:
            found = [Prediction(**prediction) for prediction in answer["labels"]]
            assert found == alone(answer["input"], top=3)


def test_the_command_shows_labels_or_the_scores_of_tasks(ask: Ask) -> None:
    shown = ask(labelled(), "\x1b[31mred", "x" * 38, top=2, as_json=False)
    assert "\x1b" not in shown
    assert "shouting  " in shown
    assert "3." not in shown

    shown = ask(classification(classifier(True, TASKS)), "abc", as_json=False)
    assert all(name in shown for name in TASKS)
    assert "0.5  10.5  10.3" in shown
    (answer,) = ask(classification(classifier(True, TASKS)), "abc")
    assert {name: len(values) for name, values in answer["scores"].items()} == TASKS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\n\xe9t\xe9\n", r"bad\.txt: the text is not valid UTF-8: byte 0xe9 at offset 5"),
        (b"good\n" + b"x" * 50, r"bad\.txt:2: the text has 50 bytes, but only 38 fit"),
        (b"\n \n", r"bad\.txt holds no text"),
        (b"", r"bad\.txt holds no text"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(
    content: bytes, message: str, ask: Ask, tmp_path: Path
) -> None:
    bundle = classifier(False, {"logits": 3}, labels=LABELS)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        ask(classification(bundle), "good", tmp_path / "bad.txt", output=tmp_path / "out.json")

    assert not (tmp_path / "out.json").exists()
    assert bundle.calls() == {}


def test_inputs_and_outputs_that_are_not_there(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = text_models.language_model(False)
    for folder in ("folder.txt", "folder.json"):
        (tmp_path / folder).mkdir()
    stdin(monkeypatch, b"")
    for argument, message in (
        (str(tmp_path / "absent.txt"), "does not exist"),
        (str(tmp_path / "folder.txt"), "Is a directory"),
        ("[MASK]" + "x" * 5000 + ".txt", "too long"),
        ("-", "standard input holds no text"),
        ("caf\udce9 [MASK]", "not valid UTF-8"),
        ("nothing masked", r"no \[MASK\]"),
    ):
        with pytest.raises(InputError, match=message):
            ask(fill_mask(bundle), argument)
    for output in (tmp_path / "folder.json", tmp_path / "absent" / "out.json"):
        with pytest.raises(InputError, match="cannot be written"):
            ask(fill_mask(bundle), MASKED, output=output)

    assert bundle.calls() == {}


def test_a_name_of_a_file_is_a_file_and_a_text_is_what_names_none(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = '{"text": "one", "label": 1}\n\n{"text": "two\u2028lines"}\n'
    (tmp_path / "texts.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"")

    answers = ask(labelled(), "texts.jsonl", "absent.png", text=("picture.png",))
    assert [(one["source"], one["input"]) for one in answers] == [
        (None, "picture.png"),
        ("texts.jsonl:1", "one"),
        ("texts.jsonl:3", "two\u2028lines"),
        (None, "absent.png"),
    ]
    assert "1 from the command line" in ask(labelled(), "texts.jsonl", "absent.png", as_json=False)
    for name in ("picture.png", str(tmp_path), "absent.jsonl"):
        with pytest.raises(InputError, match=name):
            ask(fill_mask(text_models.language_model(False)), name)


@pytest.mark.parametrize(
    "line", [b'"text"', b"{}", b'{"text": 3}', b'{"text": "\\ud800"}', b"text", b'{"text": "\xff"}']
)
def test_lines_that_hold_no_text_are_named(line: bytes, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"bad\.jsonl"):
        ask(labelled(), tmp_path / "bad.jsonl")
