# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back: UTF-8 bytes, or any tokenizer.json, run by the `tokenizers` library.

Six special tokens come before the 256 bytes. DeepMind's tokenizer encodes the bytes alone; transformers'
`PerceiverTokenizer` puts them between [CLS] and [SEP].
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import BundleError, InputError, LongTextError, UsageError, require
from perceiver_export.runtimes.files import decode_json, parsing, read_bytes
from perceiver_export.runtimes.manifest import Manifest, misfit
from perceiver_export.runtimes.preprocessing import TextPreprocessing, TokenizerFile

if TYPE_CHECKING:
    import tokenizers


Tokens = npt.NDArray[np.int32]

_SHORTEN = "shorten it, give it in parts, or cut it with --truncate"


class Tokenizer(abc.ABC):
    """Text to at most ``length`` tokens, and back. ``mask`` is the masked token, written ``mask_text`` in a text.

    A text starts at position 0 and is padded at its end, whichever side was padded in training: transformers' pipelines
    do not pad a single text at all.
    """

    length: int
    pad_token: int
    mask: int
    mask_text: str
    mask_hint: str

    @abc.abstractmethod
    def encode(self, text: str | bytes) -> Tokens:
        """The tokens (n,) of a text with special tokens, but without padding.

        Raises InputError: an empty text, not UTF-8, or a text that is too long and is not cut.
        """

    @abc.abstractmethod
    def cuts(self, text: str | bytes) -> bool:
        """Whether `encode` cuts this text."""

    @abc.abstractmethod
    def symbol(self, token: int) -> str:
        """One token in readable form."""

    @abc.abstractmethod
    def text(self, tokens: Tokens) -> str:
        """The text of tokens from `encode` with their masks filled, without the special tokens that `encode` added."""

    @abc.abstractmethod
    def ordinary(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        """For each token, whether it is text and not special."""

    def pad(self, rows: Sequence[Tokens]) -> dict[str, Tokens]:
        """The model's ``tokens`` and ``tokens_mask`` (1 is text, 0 is padding), both (n, length), for encoded texts."""
        tokens = np.full((len(rows), self.length), self.pad_token, dtype=np.int32)
        mask = np.zeros_like(tokens)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
            mask[number, : len(row)] = 1
        return {"tokens": tokens, "tokens_mask": mask}

    def __call__(self, texts: Iterable[str | bytes]) -> dict[str, Tokens]:
        """`encode` each text and `pad` them. Raises what `encode` raises."""
        return self.pad([self.encode(text) for text in texts])


def text_steps(manifest: Manifest) -> TextPreprocessing:
    """The manifest's preprocessing of text. Raises BundleError: none, or its length has no room for text."""
    steps = manifest.preprocessing
    if not isinstance(steps, TextPreprocessing):
        raise misfit("the manifest has no text preprocessing")
    special = 2 * steps.special_tokens if steps.tokenizer is None else 0
    if (steps.length if steps.cut is None else steps.cut) <= special:
        raise misfit(f"the model's {steps.length} tokens have no room for text")
    return steps


def utf8(text: str | bytes) -> bytes:
    """The bytes of a text. Raises InputError with the offset if it is not valid UTF-8."""
    if not isinstance(text, str | bytes):
        raise InputError(f"the text is of type {type(text).__name__}", "give one text, str or bytes")
    try:
        # On the command line, bytes that are not UTF-8 arrive as surrogate escapes.
        content = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        content.decode("utf-8")
    except UnicodeEncodeError as error:
        found = f"character {error.start} of the text is {error.object[error.start]!a}, half of a UTF-16 pair"
        raise InputError(found, "read the text with the right encoding") from error
    except UnicodeDecodeError as error:
        found = f"the text is not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise InputError(found, "convert it first, as with iconv -f LATIN1 -t UTF-8 for Latin-1") from error
    return content


# The index is the token's number.
SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]")
PAD, BOS, EOS, MASK, CLS, SEP = range(len(SPECIAL_TOKENS))
FIRST_BYTE = len(SPECIAL_TOKENS)
VOCABULARY = FIRST_BYTE + 256
_BYTES = [*(name.encode() for name in SPECIAL_TOKENS), *(bytes([byte]) for byte in range(256))]  # by token

_MASKS = rb"\[MASK(?:\*(?P<count>[0-9]+))?\]"
_ONLY_MASKS = re.compile(_MASKS)
_ANY_SPECIAL = re.compile(_MASKS + rb"|\[(?:PAD|BOS|EOS|CLS|SEP)\]")


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes to at most ``length`` tokens, and back.

    In a text, ``[MASK]`` is one masked byte and ``[MASK*9]`` is nine. With ``special_tokens``, as in transformers, the
    text is put between [CLS] and [SEP], and the names of other special tokens also stand for those tokens:
    ``first[SEP]second`` is a pair of texts. Without it, as in DeepMind's code, the names are plain text. A text of more
    than ``length`` tokens is an error, or with ``cut`` is cut to that many tokens on ``side``.
    """

    length: int
    special_tokens: bool
    cut: int | None = None
    side: Literal["left", "right"] = "right"

    pad_token = PAD
    mask = MASK
    mask_text = "[MASK]"
    mask_hint = "write [MASK] for each byte to fill, or [MASK*9] for nine: This is [MASK*9]."

    @property
    def room(self) -> int:
        """The number of bytes of text that fit."""
        return (self.length if self.cut is None else self.cut) - 2 * self.special_tokens

    def encode(self, text: str | bytes) -> Tokens:
        """See `Tokenizer.encode`."""
        content = utf8(text)
        if not content:
            raise InputError("the text is empty", "give at least one character")
        pieces = list(self._pieces(content))
        size = sum(count for _, count in pieces)
        if size > self.room and self.cut is None:  # before creating arrays, which [MASK*999999999] would make huge
            masks = "[MASK] is one byte, " * (b"[MASK" in content)
            hint = f"{_SHORTEN}; {masks}a character outside ASCII has 2 to 4 bytes"
            raise LongTextError(f"the text has {size} bytes, but only {self.room} fit into the model", hint)
        parts = [
            np.full(min(count, self.room), piece)
            if isinstance(piece, int)
            else np.frombuffer(piece, np.uint8).astype(np.int32) + FIRST_BYTE
            for piece, count in pieces
        ]
        tokens = np.concatenate(parts)
        tokens = tokens[: self.room] if self.side == "right" else tokens[-self.room :]
        return np.concatenate([[CLS], tokens, [SEP]] if self.special_tokens else [tokens]).astype(np.int32)

    def cuts(self, text: str | bytes) -> bool:
        """See `Tokenizer.cuts`."""
        return sum(count for _, count in self._pieces(utf8(text))) > self.room

    def symbol(self, token: int) -> str:
        r"""``a``, ``\n``, ``\xc3`` (part of a longer character), ``[PAD]``, or ``<300>``, which is not a byte."""
        if not 0 <= token < VOCABULARY:
            return f"<{token}>"
        if token >= FIRST_BYTE + 128:
            return f"\\x{token - FIRST_BYTE:02x}"
        text = _decoded([token])
        return text if text.isprintable() else ascii(text)[1:-1]

    def text(self, tokens: Tokens) -> str:
        """See `Tokenizer.text`. Other special tokens are written by name; tokens that are not bytes become U+FFFD."""
        return _decoded(tokens[1:-1] if self.special_tokens else tokens)

    def ordinary(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        """See `Tokenizer.ordinary`."""
        return np.asarray(tokens >= FIRST_BYTE)

    def _pieces(self, content: bytes) -> Iterator[tuple[bytes | int, int]]:
        """Bytes and special tokens in turn, each with its number of tokens."""
        start = 0
        for match in (_ANY_SPECIAL if self.special_tokens else _ONLY_MASKS).finditer(content):
            yield content[start : match.start()], match.start() - start
            yield _special(match)
            start = match.end()
        yield content[start:], len(content) - start


def _decoded(tokens: Iterable[int]) -> str:
    # A token that is not a byte is read as 0xFF, which never occurs in UTF-8.
    content = b"".join(_BYTES[token if 0 <= token < VOCABULARY else -1] for token in tokens)
    return content.decode("utf-8", errors="replace")


def _special(match: re.Match[bytes]) -> tuple[int, int]:
    """The special token and its number of repetitions."""
    if not match[0].startswith(b"[MASK"):
        return SPECIAL_TOKENS.index(match[0].decode()), 1
    digits = (match["count"] or b"1").lstrip(b"0")
    if not digits:
        raise InputError(f"{match[0].decode()} masks no bytes", "give a number of bytes: [MASK*9]")
    return MASK, int(digits) if len(digits) < 10 else 10**9  # far beyond any model


_MOST = 128 << 20  # bytes; the largest vocabularies, with 256,000 tokens, take 35 MB
_MOST_TOKENS = 10**7
_LONG_NUMBER = re.compile(r":\s*[0-9]{8}")  # as many digits as `_MOST_TOKENS` has
_AGAIN = "save it again: AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
# As PreTrainedTokenizerBase.clean_up_tokenization, in this order.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class FileTokenizer(Tokenizer):
    """A tokenizer from a tokenizer.json. Raises BundleError: it cannot be read; MissingDependencyError."""

    def __init__(self, path: Path, steps: TextPreprocessing, file: TokenizerFile) -> None:
        self._library = read_tokenizer(path)
        self._clean_up = file.clean_up
        self._library.no_padding()
        self._library.no_truncation()
        if steps.cut is not None:
            with parsing(str(path), f"cannot cut texts to {steps.cut} tokens", "export the bundle again", BundleError):
                self._library.enable_truncation(steps.cut, direction=steps.truncation_side)
        mask = self._library.token_to_id(file.mask) if file.mask else None
        self.length, self.pad_token, self.mask = steps.length, file.pad, -1 if mask is None else mask
        self.mask_text = "" if mask is None else file.mask
        self.mask_hint = f"write {self.mask_text} for each token to fill"
        added = self._library.get_added_tokens_decoder()
        self._special = np.array([token for token, one in added.items() if one.special], dtype=np.int64)

    def encode(self, text: str | bytes) -> Tokens:
        """See `Tokenizer.encode`."""
        content = utf8(text).decode()
        if not content:
            raise InputError("the text is empty", "give at least one character")
        with parsing("the tokenizer", "fails on the text", "give another text"):
            tokens = np.array(self._library.encode(content).ids, dtype=np.int32)
        if not len(tokens):
            raise InputError(f"the text {content[:40]!r} has no tokens", "give a text with letters")
        if len(tokens) > self.length:
            said = f"the text has {len(tokens)} tokens, but only {self.length} fit into the model"
            raise LongTextError(said, _SHORTEN)
        return tokens

    def cuts(self, text: str | bytes) -> bool:
        """See `Tokenizer.cuts`."""
        with parsing("the tokenizer", "fails on the text", "give another text"):
            return bool(self._library.encode(utf8(text).decode()).overflowing)

    def symbol(self, token: int) -> str:
        """The token's text, as in transformers' fill-mask pipeline."""
        return self._decode([token], special=True)

    def text(self, tokens: Tokens) -> str:
        """See `Tokenizer.text`. All special tokens are omitted, as in transformers' fill-mask pipeline."""
        return self._decode(tokens.tolist(), special=False)

    def ordinary(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        """See `Tokenizer.ordinary`."""
        return ~np.isin(tokens, self._special)

    def _decode(self, tokens: list[int], special: bool) -> str:
        with parsing("the tokenizer", "fails to decode its tokens", "save the tokenizer and export again"):
            text = self._library.decode(tokens, skip_special_tokens=not special)
        if self._clean_up:
            for spaced in _CLEANED:
                text = text.replace(spaced, spaced.strip())
        return text


def open_tokenizer(manifest: Manifest, directory: Path) -> Tokenizer:
    """The tokenizer of the bundle in ``directory``.

    Raises BundleError: it has no preprocessing of text, or its tokenizer cannot be read; MissingDependencyError.
    """
    steps = text_steps(manifest)
    if steps.tokenizer is None:
        return ByteTokenizer(steps.length, steps.special_tokens, steps.cut, steps.truncation_side)
    return FileTokenizer(directory / steps.tokenizer.file, steps, steps.tokenizer)


def truncating(bundle: Bundle) -> Bundle:
    """The bundle with preprocessing that cuts long texts. Raises UsageError: it takes no text."""
    steps = bundle.manifest.preprocessing
    if not isinstance(steps, TextPreprocessing):
        raise UsageError(f"{bundle.manifest.task} takes no text that could be cut", "omit truncate")
    steps = msgspec.structs.replace(steps, truncate=True)
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, preprocessing=steps))


def tokenizer_of(bundle: Bundle) -> Tokenizer | None:
    """The tokenizer of a bundle; None if it takes no text. Raises what `open_tokenizer` raises."""
    is_text = isinstance(bundle.manifest.preprocessing, TextPreprocessing)
    return open_tokenizer(bundle.manifest, bundle.path) if is_text else None


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json, which may be untrusted. Raises BundleError, MissingDependencyError."""
    library = require("tokenizers", "the model's tokenizer", "text")
    with parsing(str(path), "is not a readable tokenizer", _AGAIN, BundleError):
        content = read_bytes(path, _MOST).decode()
        _check_ids(content)
        return cast("tokenizers.Tokenizer", library.Tokenizer.from_str(content))


def _check_ids(content: str) -> None:
    """Raise ValueError for a token number beyond any vocabulary. The library allocates a table with that many rows, and
    ends the process if memory runs out.
    """
    if not _LONG_NUMBER.search(content):
        return
    file = decode_json(content.encode(), dict[str, Any])
    vocabulary = file["model"].get("vocab")
    numbers = [one["id"] for one in file.get("added_tokens", ())]
    numbers += vocabulary.values() if isinstance(vocabulary, dict) else ()
    if max((one for one in numbers if isinstance(one, int)), default=0) >= _MOST_TOKENS:
        raise ValueError(f"it has a token with the number {_MOST_TOKENS} or more")
