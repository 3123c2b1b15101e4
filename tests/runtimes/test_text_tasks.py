# SPDX-License-Identifier: Apache-2.0
"""Fill-mask and text classification on whole and split bundles, and what they refuse."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from perceiver_export.runtimes.errors import BundleError, InputError, UsageError
from perceiver_export.runtimes.preprocessing import ImagePreprocessing, TextPreprocessing
from perceiver_export.runtimes.tasks.base import softmax
from perceiver_export.runtimes.tasks.text import FillMask, TextClassification
from perceiver_export.runtimes.tasks.tokenizers import VOCABULARY, ByteTokenizer

from .text_models import (
    BATCHES,
    LABELS,
    LENGTH,
    MASKED,
    SENTENCE,
    TASKS,
    Size,
    classification,
    classifier,
    expected_logits,
    fill_mask,
    language_model,
    read,
    scores,
)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_masks_are_filled(split: bool, special_tokens: bool, batch: Size) -> None:
    bundle = language_model(split, special_tokens, batch)
    with fill_mask(bundle) as fill:
        filled = fill(MASKED, top=3)

    assert filled.text == SENTENCE
    first = MASKED.index("[") + special_tokens
    assert [blank.position for blank in filled.blanks] == [first, first + 1]
    assert [[candidate.symbol for candidate in blank.candidates] for blank in filled.blanks] == [list("stu")] * 2
    assert filled.blanks[0].candidates[0].token == ord("s") + 6
    assert bundle.calls() == ({"encoder": 1, "decoder": 1} if split else {"whole": 1})


def test_probabilities_are_the_softmax_over_all_tokens() -> None:
    with fill_mask(language_model(split=False)) as fill:
        logits = fill.logits(MASKED, [17])
        candidates = fill(MASKED, top=300).blanks[0].candidates

    assert len(candidates) == VOCABULARY
    assert sum(candidate.probability for candidate in candidates) == pytest.approx(1)
    assert [candidate.probability for candidate in candidates] == sorted(softmax(logits)[0].tolist(), reverse=True)


def test_only_masked_positions_are_decoded() -> None:
    bundle = language_model(split=True)
    with fill_mask(bundle) as fill:
        fill("[MASK]wo [MASK*5] are [MASK]")

    calls = bundle.parts["decoder"].calls
    assert [call["queries"].tolist() for call in calls] == [[[1, 5, 6, 7]], [[8, 9, 15, 15]]]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("special_tokens", [False, True])
def test_whole_and_split_bundles_give_the_same_logits_anywhere(special_tokens: bool, batch: Size) -> None:
    positions = [39, 0, 7, 7, 12, 1]
    found = []
    for split in (False, True):
        with fill_mask(language_model(split, special_tokens, batch)) as fill:
            found += [fill.logits(SENTENCE, positions), fill.logits(SENTENCE, np.array(positions, np.uint16))]

    whisper = 1 + read(ByteTokenizer(LENGTH, special_tokens)([SENTENCE]))[0, 0]
    assert {(logits.shape, logits.dtype.name) for logits in found} == {((6, VOCABULARY), "float32")}
    for logits in found:
        np.testing.assert_array_equal(logits, expected_logits(special_tokens)[positions] * whisper)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("positions", [[40], [-1], [3, 1000], [], [1.0], [[1]], [True], ["1"], [1 << 40]], ids=str)
def test_positions_that_are_none_are_refused(split: bool, positions: Any) -> None:
    with fill_mask(language_model(split)) as fill, pytest.raises(InputError):
        fill.logits(SENTENCE, positions)


def test_special_tokens_that_the_model_prefers_are_named() -> None:
    """Behind the sentence this model expects [SEP], then [PAD]."""
    with fill_mask(language_model(split=False)) as fill:
        filled = fill(SENTENCE + "[MASK*2]")

    assert filled.text == SENTENCE + "[SEP][PAD]"
    assert [blank.candidates[0].symbol for blank in filled.blanks] == ["[SEP]", "[PAD]"]


def test_bytes_that_are_no_utf8_together_are_replaced() -> None:
    bundle = language_model(split=False)
    with fill_mask(bundle) as fill:
        assert fill("[MASK]日".encode()).text == "T日"
    bundle.parts["whole"].function = lambda feeds: {"logits": np.eye(LENGTH, VOCABULARY, 220, dtype=np.float32)[None]}
    with fill_mask(bundle) as fill:
        filled = fill("x[MASK]y")

    assert filled.text == "x\ufffdy"
    assert filled.blanks[0].candidates[0].symbol == "\\xd8"


@pytest.mark.parametrize("split", [False, True])
def test_texts_that_cannot_be_filled_are_refused_before_anything_runs(split: bool) -> None:
    bundle = language_model(split)
    with fill_mask(bundle) as fill:
        for text in (SENTENCE, "", "[MASK*39]", b"[MASK]\xff"):
            with pytest.raises(InputError):
                fill(text)
        with pytest.raises(InputError, match=r"no \[MASK\]") as caught:
            fill("[mask]")
        with pytest.raises(UsageError):
            fill(MASKED, top=0)

    assert "[MASK*9]" in caught.value.hint
    assert bundle.calls() == {}


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_texts_are_classified(split: bool, batch: Size) -> None:
    texts = ["no", "a much longer text", "\x7f", "b", "c", "d", "e"]
    bundle = classifier(split, {"logits": 3}, batch, labels=LABELS)
    with classification(bundle) as classify:
        answers = classify.batch(texts, top=2)
        alone = [classify(text, top=2) for text in texts]
        outputs = classify.outputs(texts)

    expected = scores(ByteTokenizer(LENGTH, True)(texts), 3)
    np.testing.assert_array_equal(outputs["logits"], expected)
    assert answers == alone
    for row, answer in zip(expected, answers, strict=True):
        assert isinstance(answer, list)
        best = np.argsort(-row, kind="stable")[:2].tolist()
        assert [prediction.index for prediction in answer] == best
        assert [prediction.label for prediction in answer] == [LABELS[index] for index in best]
        assert [prediction.probability for prediction in answer] == pytest.approx(softmax(row)[best].tolist())


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_a_bundle_of_several_tasks_gives_the_scores_of_each(split: bool, batch: Size) -> None:
    with classification(classifier(split, TASKS, batch)) as classify:
        answer = classify("first[SEP]second")
        alone = {name: classify.task("first[SEP]second", name) for name in TASKS}

    feeds = ByteTokenizer(LENGTH, True)(["first[SEP]second"])
    for found in (answer, alone):
        assert isinstance(found, dict)
        assert list(found) == list(TASKS)
        for name, classes in TASKS.items():
            np.testing.assert_array_equal(found[name], scores(feeds, classes)[0])


def test_only_the_decoder_of_the_asked_task_runs() -> None:
    bundle = classifier(True, TASKS)
    with classification(bundle) as classify:
        classify.task("text", "mnli")
        assert bundle.calls() == {"encoder": 1, "decoder_mnli": 1}
        for unknown in ("rte", "logits", "latents"):
            with pytest.raises(UsageError, match=unknown) as caught:
                classify.task("text", unknown)

    assert all(name in caught.value.hint for name in TASKS)


def test_one_text_is_one_sample_and_labels_leave_no_task_to_name() -> None:
    with classification(classifier(False, {"logits": 3}, labels=LABELS)) as classify:
        assert classify.batch("abc") == [classify("abc")]
        np.testing.assert_array_equal(classify.outputs(b"abc")["logits"], classify.outputs(["abc"])["logits"])
        with pytest.raises(UsageError):
            classify.task("text", "logits")
    for split in (False, True):  # one task without labels is a task
        with classification(classifier(split, {"stsb": 1})) as classify:
            assert classify.task("abc", "stsb").tolist() == pytest.approx([0.5])


@pytest.mark.parametrize("split", [False, True])
def test_texts_that_cannot_be_classified_are_refused_before_anything_runs(split: bool) -> None:
    bundle = classifier(split, {"logits": 3}, labels=LABELS)
    with classification(bundle) as classify:
        for text in ("", "x" * 39, b"\xff"):
            with pytest.raises(InputError):
                classify(text)
        none_and_no_lists: list[Any] = [[], 3]
        for texts in none_and_no_lists:
            for method in (classify.batch, classify.outputs):
                with pytest.raises(InputError, match="texts"):
                    method(texts)
        with pytest.raises(InputError, match="of type int"):
            classify.batch([3])  # type: ignore[list-item]
        with pytest.raises(UsageError):
            classify("text", top=0)

    assert bundle.calls() == {}


@pytest.mark.parametrize(
    "steps", [None, ImagePreprocessing(8, 8, ()), TextPreprocessing(2, True), TextPreprocessing(LENGTH + 1, True)]
)
def test_manifests_of_other_things_are_refused(steps: Any) -> None:
    for task, bundle in ((FillMask, language_model(False)), (TextClassification, classifier(False, TASKS))):
        with pytest.raises(BundleError):
            task.check(msgspec.structs.replace(bundle.manifest, preprocessing=steps))


def test_graphs_of_another_task_are_refused() -> None:
    with pytest.raises(BundleError, match=r"outputs .* logits"):
        FillMask.check(classifier(False, {"logits": 3}).manifest)
    for bundle in (
        language_model(False),
        classifier(False, {"logits": 2}, labels=LABELS),
        classifier(False, TASKS, labels=LABELS),
    ):
        with pytest.raises(BundleError):
            TextClassification.check(bundle.manifest)


@pytest.mark.parametrize("missing", ["decoder", "decoder_mnli"])
def test_split_bundles_without_a_decoder_are_refused(missing: str) -> None:
    bundle = language_model(True) if missing == "decoder" else classifier(True, TASKS)
    parts = {name: part for name, part in bundle.manifest.parts.items() if name != missing}
    task = FillMask if missing == "decoder" else TextClassification
    with pytest.raises(BundleError, match="decoder"):
        task.check(msgspec.structs.replace(bundle.manifest, parts=parts))
