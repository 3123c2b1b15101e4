# SPDX-License-Identifier: Apache-2.0
"""The byte tokenizer is DeepMind's and transformers', and what is no text is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes.errors import InputError
from perceiver_export.runtimes.tasks.tokenizers import (
    CLS,
    FIRST_BYTE,
    MASK,
    SEP,
    SPECIAL_TOKENS,
    VOCABULARY,
    ByteTokenizer,
)
from tests.vector_folders import vector_folders

VECTORS = [
    json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) for folder in vector_folders("tokenizer.json")
]
DEEPMIND = ByteTokenizer(512, special_tokens=False)
TRANSFORMERS = ByteTokenizer(512, special_tokens=True)
TEXTS = [
    "This is an incomplete sentence where some words are[MASK][MASK][MASK] [MASK].",
    "[[MASK]] [mask] [MASK [MASKED] MASK]",
    "first[SEP]second",
    "[PAD][BOS][EOS][CLS]",
    "  Grüße,\u00a0naïve café 日本語 🙂\r\n\ttabs\x00\x7f ",
]


@pytest.fixture(scope="module")
def original() -> Any:
    return pytest.importorskip("transformers").PerceiverTokenizer(model_max_length=512)


def cases(*groups: str) -> list[dict[str, Any]]:
    return [case for vectors in VECTORS for group in groups for case in vectors[group]]


def text_of(tokens: list[int]) -> str:
    """The text of tokens without the special ones, which DeepMind's code leaves out."""
    return DEEPMIND.text(np.array([token for token in tokens if token >= FIRST_BYTE], dtype=np.int32))


@pytest.mark.parametrize("vectors", VECTORS)
def test_the_special_tokens_are_deepminds(vectors: dict[str, Any]) -> None:
    names = {name.strip("[]").lower(): token for token, name in enumerate(SPECIAL_TOKENS)}

    assert names == vectors["special"]
    assert vectors["vocab_size"] == VOCABULARY


@pytest.mark.parametrize("case", [case for case in cases("encode") if case["text"]])
def test_texts_are_encoded_as_by_deepminds_code(case: dict[str, Any]) -> None:
    for text in (case["text"], case["text"].encode()):
        tokens = DEEPMIND.encode(text)

        assert tokens.dtype == np.int32
        assert tokens.tolist() == case["ids"]


@pytest.mark.parametrize("case", cases("encode_bytes"))
def test_bytes_are_encoded_as_by_deepminds_code(case: dict[str, Any]) -> None:
    content = bytes.fromhex(case["bytes_hex"])
    try:
        content.decode()
    except UnicodeDecodeError:  # DeepMind's code encodes any bytes, here they are refused
        with pytest.raises(InputError, match="not valid UTF-8"):
            DEEPMIND.encode(content)
    else:
        assert DEEPMIND.encode(content).tolist() == case["ids"]


@pytest.mark.parametrize("case", cases("decode", "round_trip"))
def test_tokens_are_decoded_as_by_deepminds_code(case: dict[str, Any]) -> None:
    assert text_of(case["ids"]) == case["text"]


@pytest.mark.parametrize("case", [vectors["pad"] for vectors in VECTORS])
def test_padding_is_deepminds(case: dict[str, Any]) -> None:
    padded = ByteTokenizer(case["max_sequence_length"], special_tokens=False)([text_of(case["inputs"])])

    assert [array.dtype.name for array in padded.values()] == ["int32", "int32"]
    assert [array.shape for array in padded.values()] == [(1, case["max_sequence_length"])] * 2
    assert padded["tokens"][0].tolist() == case["padded"]
    assert padded["tokens_mask"][0].tolist() == case["mask"]


def test_texts_are_encoded_and_padded_as_by_transformers(original: Any) -> None:
    expected = original(TEXTS, padding="max_length", max_length=512)
    found = TRANSFORMERS(TEXTS)

    assert found["tokens"].tolist() == expected["input_ids"]
    assert found["tokens_mask"].tolist() == expected["attention_mask"]


def test_a_pair_of_texts_is_transformers_pair(original: Any) -> None:
    assert TRANSFORMERS.encode("first[SEP]second").tolist() == original("first", "second")["input_ids"]


def test_any_text_is_encoded_and_decoded_as_by_transformers(original: Any) -> None:
    random = np.random.default_rng(0)
    letters = [chr(code) for code in (*range(0x250), 0x300, 0x2028, 0x65E5, 0xFEFF, 0xFFFD, 0x1F642, 0x10FFFF)]
    tokenizer, every_token = (ByteTokenizer(2048, special_tokens=special) for special in (True, False))
    for _ in range(200):
        text = "".join(random.choice([*letters, *SPECIAL_TOKENS * 20], size=random.integers(1, 60)))
        tokens = tokenizer.encode(text)

        assert tokens.tolist() == original(text)["input_ids"]
        assert every_token.text(tokens) == original.decode(tokens.tolist(), clean_up_tokenization_spaces=False)


def test_nine_masks_are_written_short() -> None:
    for tokenizer in (DEEPMIND, TRANSFORMERS):
        expected = tokenizer.encode("words are" + "[MASK]" * 9 + ".")

        assert tokenizer.encode("words are[MASK*9].").tolist() == expected.tolist()
        assert tokenizer.encode("words are[MASK*007][MASK*2].").tolist() == expected.tolist()
    assert DEEPMIND.encode("a[MASK*2]").tolist() == [ord("a") + 6, MASK, MASK]


def test_deepmind_knows_no_special_token_but_the_mask() -> None:
    assert DEEPMIND.encode("[SEP]").tolist() == [byte + 6 for byte in b"[SEP]"]
    assert TRANSFORMERS.encode("[SEP]").tolist() == [CLS, SEP, SEP]


def test_special_tokens_are_written_by_name_where_asked() -> None:
    tokens = TRANSFORMERS.encode("a[MASK]b[PAD]")

    assert DEEPMIND.text(tokens) == "[CLS]a[MASK]b[PAD][SEP]"
    assert TRANSFORMERS.text(tokens) == "a[MASK]b[PAD]"
    assert DEEPMIND.text(DEEPMIND.encode("ab")) == "ab"


def test_symbols_are_readable() -> None:
    shown = [DEEPMIND.symbol(token) for token in (0, 3, 6, 6 + 10, 6 + 32, 6 + 97, 6 + 127, 6 + 195, 261)]

    assert shown == ["[PAD]", "[MASK]", "\\x00", "\\n", " ", "a", "\\x7f", "\\xc3", "\\xff"]
    assert len({DEEPMIND.symbol(token) for token in range(VOCABULARY)}) == VOCABULARY


def test_a_token_that_is_no_byte_is_written_as_its_number() -> None:
    assert [DEEPMIND.symbol(token) for token in (VOCABULARY, -1)] == ["<262>", "<-1>"]
    assert DEEPMIND.text(np.array([103, VOCABULARY], np.int32)) == "a\ufffd"


@pytest.mark.parametrize("special_tokens", [False, True])
def test_a_text_may_be_as_long_as_the_model_and_no_longer(special_tokens: bool) -> None:
    tokenizer = ByteTokenizer(12, special_tokens)
    assert len(tokenizer.encode("x" * tokenizer.room)) == 12

    for text, size in (("x" * (tokenizer.room + 1), tokenizer.room + 1), ("日本語日本語", 18), ("ab[MASK*99]", 101)):
        with pytest.raises(InputError, match=f"has {size} bytes, but only {tokenizer.room} fit"):
            tokenizer.encode(text)


UTF_8 = "not valid UTF-8: byte 0x.. at offset {}\nhint: "
REFUSED: list[tuple[Any, str | None]] = [
    *((text, None) for text in ("", b"", "[MASK*0]", "a[MASK*000]", None, 7, ["a"])),
    *((f"[MASK*{count}]", "512 fit") for count in ("999999999999", "9" * 5000)),  # before they are made
    (b"caf\xe9 au lait", UTF_8.format(3)),
    (b"\xff", UTF_8.format(0)),
    ("日".encode()[:2], UTF_8.format(0)),
    ("caf\udce9", UTF_8.format(3)),
    ("ab\ud83d", r"character 2 of the text is '\\ud83d'"),  # half of a UTF-16 pair
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_text_is_refused(text: Any, said: str | None) -> None:
    with pytest.raises(InputError, match=said):
        DEEPMIND.encode(text)
