# SPDX-License-Identifier: Apache-2.0
"""Text as the language models read it: UTF-8 bytes, numbered after six special tokens.

DeepMind's tokenizer gives the bytes alone; transformers' `PerceiverTokenizer` puts them between [CLS] and [SEP].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import BundleError, InputError
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.preprocessing import TextPreprocessing

Tokens = npt.NDArray[np.int32]

# The index is the token.
SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]")
PAD, BOS, EOS, MASK, CLS, SEP = range(len(SPECIAL_TOKENS))
FIRST_BYTE = len(SPECIAL_TOKENS)
VOCABULARY = FIRST_BYTE + 256

_MASKS = rb"\[MASK(?:\*(?P<count>[0-9]+))?\]"
_ONLY_MASKS = re.compile(_MASKS)
_ANY_SPECIAL = re.compile(_MASKS + rb"|\[(?:PAD|BOS|EOS|CLS|SEP)\]")


@dataclass(frozen=True)
class ByteTokenizer:
    """Text to tokens, at most ``length`` of them, and back.

    Written in the text, ``[MASK]`` is one masked byte and ``[MASK*9]`` is nine. With ``special_tokens``, as in
    transformers, the text stands between [CLS] and [SEP], and the names of the other special tokens are read as those
    tokens too: ``first[SEP]second`` is a pair of texts. Without, as in DeepMind's code, they are plain text.
    """

    length: int
    special_tokens: bool

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> ByteTokenizer:
        """The tokenizer that a bundle needs. Raises BundleError: its preprocessing is not of text."""
        steps = manifest.preprocessing
        if not isinstance(steps, TextPreprocessing):
            raise BundleError("the manifest has no text preprocessing", "export the bundle again")
        tokenizer = cls(steps.length, steps.special_tokens)
        if tokenizer.room < 1:
            raise BundleError(f"no text fits into {steps.length} tokens", "export the bundle again")
        return tokenizer

    @property
    def room(self) -> int:
        """How many bytes of text fit."""
        return self.length - 2 * self.special_tokens

    def encode(self, text: str | bytes) -> Tokens:
        """The tokens (n,) of a text, with [CLS] and [SEP] where the model wants them, not padded.

        Raises InputError: an empty text, not UTF-8, or longer than the model.
        """
        content = utf8(text)
        if not content:
            raise InputError("the text is empty", "give at least one character")
        pieces = list(self._pieces(content))
        size = sum(count for _, count in pieces)
        if size > self.room:  # before any array is made: [MASK*999999999] is short to write
            raise InputError(
                f"the text has {size} bytes, {self.room} fit into the model",
                "shorten it, or give it in parts; a [MASK] counts as one byte, a letter outside ASCII as 2 to 4",
            )
        tokens = [np.full(count, piece) if isinstance(piece, int) else byte_tokens(piece) for piece, count in pieces]
        if self.special_tokens:
            tokens = [np.array([CLS]), *tokens, np.array([SEP])]
        return np.concatenate(tokens).astype(np.int32)

    def pad(self, rows: Sequence[Tokens]) -> dict[str, Tokens]:
        """The model's ``tokens`` and ``tokens_mask`` (1 is text, 0 is padding), both (n, length), of encoded texts."""
        tokens = np.full((len(rows), self.length), PAD, dtype=np.int32)
        mask = np.zeros_like(tokens)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
            mask[number, : len(row)] = 1
        return {"tokens": tokens, "tokens_mask": mask}

    def __call__(self, texts: Iterable[str | bytes]) -> dict[str, Tokens]:
        """`encode` and `pad` of each text. Raises what `encode` raises."""
        return self.pad([self.encode(text) for text in texts])

    def strip(self, tokens: Tokens) -> Tokens:
        """What `encode` gave, without the [CLS] and [SEP] that it added."""
        return tokens[1:-1] if self.special_tokens else tokens

    def _pieces(self, content: bytes) -> Iterator[tuple[bytes | int, int]]:
        """Bytes and special tokens in turn, each with how many tokens it is."""
        start = 0
        for match in (_ANY_SPECIAL if self.special_tokens else _ONLY_MASKS).finditer(content):
            yield content[start : match.start()], match.start() - start
            yield _special(match)
            start = match.end()
        yield content[start:], len(content) - start


def byte_tokens(content: bytes) -> Tokens:
    """The tokens (n,) of n bytes: each plus 6. Nothing is read as a special token."""
    return np.frombuffer(content, dtype=np.uint8).astype(np.int32) + FIRST_BYTE


def decode(tokens: Sequence[int] | npt.NDArray[np.integer], special: bool = False) -> str:
    """The text of tokens (n,), whatever a model made of it: what is not UTF-8 becomes U+FFFD.

    Special tokens are left out, or with ``special`` written by name. Raises InputError: no such token.
    """
    content = bytearray()
    for token in tokens:
        if not 0 <= token < VOCABULARY:
            raise InputError(f"{token} is not a token", f"tokens are 0 to {VOCABULARY - 1}")
        if token >= FIRST_BYTE:
            content.append(int(token) - FIRST_BYTE)
        elif special:
            content += SPECIAL_TOKENS[token].encode()
    return content.decode("utf-8", errors="replace")


def symbol(token: int) -> str:
    r"""One token for people: ``a``, ``\n``, ``\xc3`` (a byte of a longer letter), ``[PAD]``. Raises InputError."""
    if FIRST_BYTE + 128 <= token < VOCABULARY:
        return f"\\x{token - FIRST_BYTE:02x}"
    text = decode([token], special=True)
    return text if text.isprintable() else ascii(text)[1:-1]


def utf8(text: str | bytes) -> bytes:
    """The bytes of a text. Raises InputError, with the offset, where it is not valid UTF-8."""
    if not isinstance(text, str | bytes):
        raise InputError(f"the text is of type {type(text).__name__}", "give one text, str or bytes")
    try:
        # Bytes of the command line that are not UTF-8 arrive as surrogate escapes.
        content = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        content.decode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} of the text is {error.object[error.start]!a}, half of a UTF-16 pair",
            "read the text with its right encoding",
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text is not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}",
            "convert it first: iconv -f LATIN1 -t UTF-8, with the encoding that it has",
        ) from error
    return content


def _special(match: re.Match[bytes]) -> tuple[int, int]:
    """The special token, and how often it stands there."""
    if not match[0].startswith(b"[MASK"):
        return SPECIAL_TOKENS.index(match[0].decode()), 1
    digits = (match["count"] or b"1").lstrip(b"0")
    if not digits:
        raise InputError(f"{match[0].decode()} masks nothing", "give the number of bytes: [MASK*9]")
    return MASK, int(digits) if len(digits) < 10 else 10**9  # far beyond any model
