# SPDX-License-Identifier: Apache-2.0
"""Find the tokenizer that a Hugging Face directory was trained with, from its files.

| the directory has | tokens are |
|---|---|
| tokenizer_config.json (or config.json) with `tokenizer_class` PerceiverTokenizer | UTF-8 bytes, ours |
| tokenizer.json | those of the tokenizers library; the file goes into the bundle |
| another `tokenizer_class`, or only vocab.txt, merges.txt, *.model, … | the bundle's input: it takes token ids |
| none of these, and `vocab_size` is 262 | UTF-8 bytes, ours; a note says so |
| none of these, and another `vocab_size` | the bundle's input: it takes token ids |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perceiver_export.runtimes.errors import BundleError, CheckpointError
from perceiver_export.runtimes.files import read_json
from perceiver_export.runtimes.preprocessing import TextPreprocessing, TokenizerFile
from perceiver_export.runtimes.tasks.tokenizers import SPECIAL_TOKENS, VOCABULARY, read_tokenizer

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
# Files to download: those that are read, and those that reveal a tokenizer without tokenizer.json.
FILES = (FILE, "tokenizer_config.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")
_OTHERS = FILES[3:]
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MASKS = ("[MASK]", "<mask>")  # of classes that name it only in their code
_OWN = "PerceiverTokenizer"
_COPY = "copy the checkpoint again"
_SAVE = "to run text, save a tokenizer.json: AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"


@dataclass(frozen=True)
class FoundTokenizer:
    """The steps from text to tokens (None: the bundle takes token ids), files for the bundle, notes for the user."""

    steps: TextPreprocessing | None
    files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_tokenizer(directory: Path, task: str, length: int, vocabulary: int) -> FoundTokenizer:
    """The tokenizer of a directory whose model takes ``length`` tokens, each below ``vocabulary``.

    Raises CheckpointError: a file that cannot be read; MissingDependencyError: the tokenizers library.
    """
    config = _read(directory / "special_tokens_map.json") | _read(directory / "tokenizer_config.json")
    name = config.get("tokenizer_class") or _read(directory / "config.json").get("tokenizer_class")
    name = str(name or "").removesuffix("Fast")
    limits = _Limits.of(config, length)
    if name == _OWN:
        return _bytes(config, limits, vocabulary)
    if os.path.lexists(directory / FILE):
        return _from_file(directory / FILE, config, limits, vocabulary, task == "fill-mask")
    others = sorted(file.name for pattern in _OTHERS for file in directory.glob(pattern))
    if name or others:
        what = f"the tokenizer is {name or 'in ' + ', '.join(others)}, without a tokenizer.json"
        return FoundTokenizer(None, notes=(f"{what}: the bundle takes token ids; {_SAVE}",))
    if vocabulary != VOCABULARY:
        note = f"no tokenizer files, and vocab_size is {vocabulary}: the bundle takes token ids"
        hint = f"for text, copy {FILE} and tokenizer_config.json of the model's tokenizer next to config.json"
        return FoundTokenizer(None, notes=(f"{note}; {hint}",))
    note = f"no tokenizer files: vocab_size is {VOCABULARY}, so text is read as bytes, as by {_OWN}"
    return FoundTokenizer(limits.steps(special_tokens=True), notes=(note,))


@dataclass(frozen=True)
class _Limits:
    """The limits of tokenizer_config.json for long texts."""

    length: int
    most: int
    side: Literal["left", "right"]

    @classmethod
    def of(cls, config: Mapping[str, Any], length: int) -> _Limits:
        most, side = config.get("model_max_length"), config.get("truncation_side", "right")
        most = length if most is None else most
        if not isinstance(most, int | float) or most < 1 or side not in ("left", "right"):
            raise CheckpointError(
                f"tokenizer_config.json: model_max_length is {most!r}, truncation_side {side!r}",
                "give a number above 0, and left or right",
            )
        return cls(length, int(min(most, length)), side)

    def steps(self, special_tokens: bool, file: TokenizerFile | None = None, cut: bool = False) -> TextPreprocessing:
        most = self.most if self.most < self.length else 0
        return TextPreprocessing(self.length, special_tokens, file, cut, most, self.side)


def _bytes(config: Mapping[str, Any], limits: _Limits, vocabulary: int) -> FoundTokenizer:
    named = {key: _text(config[key]) for key in _NAMED if config.get(key) is not None and key != "unk_token"}
    wrong = next((key for key, text in named.items() if text != f"[{key.removesuffix('_token').upper()}]"), None)
    decoder = config.get("added_tokens_decoder")
    added = [_text(one) for one in (decoder.values() if isinstance(decoder, dict) else ())]
    more = [*(text for text in added if text not in SPECIAL_TOKENS), *(config.get("extra_special_tokens") or ())]
    if wrong or more:
        what = f"its {wrong} is {named[wrong]!r}" if wrong else f"it has the extra token {more[0]!r}"
        return FoundTokenizer(None, notes=(f"{_OWN} is not the usual one ({what}): the bundle takes token ids",))
    notes = (f"the tokenizer has {VOCABULARY} tokens, but vocab_size is {vocabulary}: check that it is the model's",)
    return FoundTokenizer(limits.steps(special_tokens=True), notes=notes if vocabulary != VOCABULARY else ())


def _from_file(
    path: Path, config: Mapping[str, Any], limits: _Limits, vocabulary: int, fill_mask: bool
) -> FoundTokenizer:
    try:
        tokenizer = read_tokenizer(path.resolve())
    except BundleError as error:
        raise CheckpointError(error.message, error.hint) from error
    added = _add_named(tokenizer, config)
    named = {key: _text(config[key]) for key in _NAMED if config.get(key) is not None}
    special = {one.content for one in tokenizer.get_added_tokens_decoder().values()}
    mask = named.get("mask_token") or next((text for text in _MASKS if text in special), "")
    if fill_mask and not mask:
        note = "the tokenizer names no mask_token: the bundle takes token ids; set mask_token in tokenizer_config.json"
        return FoundTokenizer(None, notes=(note,))
    pad = tokenizer.token_to_id(named.get("pad_token", ""))
    file = TokenizerFile(FILE, mask, pad or 0, _cleans_up(tokenizer, config))
    steps = limits.steps(special_tokens=False, file=file, cut=tokenizer.truncation is not None)
    cut = f"texts of more than {limits.most} tokens are cut on the {limits.side}, as {FILE} says"
    notes = [cut] if steps.truncate else []
    if not config.get("tokenizer_class"):
        notes.append(f"tokenizer_config.json names no tokenizer_class: text is tokenized by {FILE}")
    if (config.get("padding_side") or (tokenizer.padding or {}).get("direction")) == "left":
        notes.append(
            "the tokenizer pads on the left, but texts begin at position 0, as in the pipelines of transformers"
        )
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocabulary:
        notes.append(
            f"the tokenizer has ids up to {largest}, but the model only up to {vocabulary - 1}: others are refused"
        )
    content = tokenizer.to_str().encode() if added else path.resolve().read_bytes()
    return FoundTokenizer(steps, {FILE: content}, tuple(notes))


def _add_named(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    """Add the special tokens that only the config names, as transformers does; return whether any were added."""
    from tokenizers import AddedToken

    known = {one.content for one in tokenizer.get_added_tokens_decoder().values()}
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    found = []
    for given in (*(config.get(key) for key in _NAMED), *(more if isinstance(more, list | tuple) else ())):
        if given is not None and _text(given) not in known:
            sides = {side: bool(given.get(side)) for side in ("lstrip", "rstrip")} if isinstance(given, dict) else {}
            found.append(AddedToken(_text(given), special=True, **sides))
    return bool(tokenizer.add_special_tokens(found)) if found else False


def _cleans_up(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    """Whether transformers removes the spaces before punctuation; for BPE only where the config insists."""
    insists = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    wanted = config.get("clean_up_tokenization_spaces") or False
    return bool(wanted and (insists or type(tokenizer.model).__name__ != "BPE"))


def _text(token: Any) -> str:
    """The text of a special token: a string, or a dict with it and the treatment of spaces beside it."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"tokenizer_config.json has the special token {token!r}", "give a string")
    return text


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file does not exist."""
    # Resolve links: the hub's cache keeps a file's content elsewhere.
    return read_json(path.resolve(), dict[str, Any], CheckpointError, _COPY) if os.path.lexists(path) else {}
