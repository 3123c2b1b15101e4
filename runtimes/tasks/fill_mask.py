# SPDX-License-Identifier: Apache-2.0
"""Text with [MASK]s in, the bytes that the model puts there out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.byte_tokenizer import MASK, VOCABULARY, ByteTokenizer, Tokens, decode, symbol
from perceiver_export.runtimes.errors import BundleError, InputError
from perceiver_export.runtimes.manifest import Manifest
from perceiver_export.runtimes.queries import decode as decode_queries
from perceiver_export.runtimes.tasks.base import LoadPart, Task
from perceiver_export.runtimes.tasks.graphs import check_interface, pad_batch
from perceiver_export.runtimes.tasks.prediction import softmax
from perceiver_export.runtimes.tasks.ranking import check_top


@dataclass(frozen=True)
class Candidate:
    """A token that may stand at a masked position, as people read it, and its probability among all 262."""

    token: int
    symbol: str
    probability: float


@dataclass(frozen=True)
class Blank:
    """A masked position, counted in tokens ([CLS] is 0 where the model has it), most probable candidate first."""

    position: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Filled:
    """The text with every mask replaced by its most probable token, and what else might stand there.

    Bytes that are not UTF-8 together show as U+FFFD. Where a special token is the most probable, the text has its
    name: no candidate is taken away, as in transformers' example.
    """

    text: str
    blanks: tuple[Blank, ...]


class FillMask(Task):
    """``fill("This is [MASK*7].")`` -> `Filled`. Each masked byte is filled by itself, all in one run."""

    def __init__(self, manifest: Manifest, load_part: LoadPart) -> None:
        super().__init__(manifest, load_part)
        self.tokenizer = ByteTokenizer.from_manifest(manifest)

    @staticmethod
    def check(manifest: Manifest) -> None:
        """Raise BundleError unless the manifest describes a masked language model of bytes."""
        length = ByteTokenizer.from_manifest(manifest).length
        inputs = {"tokens": (length,), "tokens_mask": (length,)}
        check_interface(manifest, inputs, {"logits": (length, VOCABULARY)})
        if "encoder" in manifest.parts:
            decoder = manifest.parts.get("decoder")
            if decoder is None or decoder.num_queries != length:
                raise BundleError(f"no decoder for {length} positions goes with the encoder", "export the bundle again")

    def __call__(self, text: str | bytes, top: int = 5) -> Filled:
        """Fill the masks of a text, with ``top`` candidates each.

        Raises InputError: no mask in the text, or what `ByteTokenizer.encode` raises; UsageError: top below 1.
        """
        check_top(top)
        tokens = self.tokenizer.encode(text)
        positions = np.flatnonzero(tokens == MASK)
        if not len(positions):
            raise InputError(
                "the text has no [MASK]", "write [MASK] for each byte to fill, or [MASK*9] for nine: This is [MASK*9]."
            )
        probabilities = softmax(self._logits(tokens, positions))
        blanks = tuple(
            Blank(int(position), _candidates(row, top)) for position, row in zip(positions, probabilities, strict=True)
        )
        filled = tokens.copy()
        filled[positions] = [blank.candidates[0].token for blank in blanks]
        return Filled(decode(self.tokenizer.strip(filled), special=True), blanks)

    def logits(self, text: str | bytes, positions: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Logits (n, 262) at n positions, counted in tokens: any of the model's, masked or not.

        Positions behind the text are allowed, but the model has not learned what to say there.

        Raises InputError: a position out of range, none at all, or what `ByteTokenizer.encode` raises.
        """
        rows, length = np.asarray(positions), self.tokenizer.length
        if rows.ndim != 1 or not rows.size or rows.dtype.kind not in "iu":
            raise InputError(
                f"positions are {rows.dtype} with shape {list(rows.shape)}", "give a list of one or more integers"
            )
        wrong = rows[(rows < 0) | (rows >= length)]
        if len(wrong):
            raise InputError(f"position {wrong[0]} is out of range", f"the model has {length}, counted from 0")
        return self._logits(self.tokenizer.encode(text), rows)

    def _logits(self, tokens: Tokens, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        model = self.part("encoder") if self.split else self.runtime
        outputs = model.run(pad_batch(model, self.tokenizer.pad([tokens])))
        if self.split:
            decoder, count = self.part("decoder"), self.manifest.parts["decoder"].num_queries
            rows = decode_queries(decoder, {"latents": outputs["latents"]}, positions, count)
        else:
            rows = outputs["logits"][:, positions]
        logits: npt.NDArray[np.float32] = rows[0]
        return logits


def _candidates(probabilities: npt.NDArray[np.float32], top: int) -> tuple[Candidate, ...]:
    order = np.argsort(-probabilities, kind="stable")[:top].tolist()
    return tuple(Candidate(token, symbol(token), float(probabilities[token])) for token in order)
